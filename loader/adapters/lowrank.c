/* out = bfloat16(base + scaling * (left @ right)), in one pass over the base.
 *
 * base, out: (rows, columns) of bfloat16, different memory; left: (rows, rank) and right: (rank,
 * columns) of float32; packed: room for 2 * LANES * rank floats, aligned to 64 bytes. All are
 * contiguous. Returns 0; 1 where a value is not finite, or as good as, and out is not to be used;
 * -1 where there are too few rows or columns, and nothing was done.
 *
 * The steps are PEFT's: each sum goes up in the order of the rank, by fused multiply-adds in float32;
 * it is scaled and rounded, added and rounded, and then rounded to bfloat16.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ROWS 6 /* with two columns of accumulators each: what the registers of AVX2 hold */

#define LANES 16
#define NAME add_low_rank_16
#define TARGET __attribute__((target("arch=x86-64-v4")))
#include "lowrank_tiles.h"
#undef LANES
#undef NAME
#undef TARGET

#define LANES 8
#define NAME add_low_rank_8
#define TARGET __attribute__((target("arch=x86-64-v3")))
#include "lowrank_tiles.h"

/* The widest that this processor has; 0 where it has neither. */
int low_rank_lanes(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 16;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
}
