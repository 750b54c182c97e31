/* Included once for each width of a processor's registers: LANES floats, NAME, TARGET. */

TARGET int NAME(uint16_t *out, const uint16_t *base, size_t rows, size_t columns,
                const float *left, const float *right, size_t rank, float scaling, float *packed)
{
    typedef float floats __attribute__((vector_size(LANES * 4)));
    typedef uint32_t words __attribute__((vector_size(LANES * 4)));
    const size_t width = 2 * LANES;
    words top = {0};

    if (rows < ROWS || columns < width)
        return -1;
    for (size_t tile = 0; tile < columns; tile += width) {
        const size_t column = tile + width > columns ? columns - width : tile;
        /* Even columns apart from odd ones, as the halves of a word of two bfloat16 are. */
        for (size_t k = 0; k < rank; k++)
            for (size_t lane = 0; lane < LANES; lane++) {
                const float *pair = right + k * columns + column + 2 * lane;
                packed[k * width + lane] = pair[0];
                packed[k * width + LANES + lane] = pair[1];
            }
        for (size_t group = 0; group < rows; group += ROWS) {
            const size_t row = group + ROWS > rows ? rows - ROWS : group;
            floats even[ROWS] = {{0}}, odd[ROWS] = {{0}};
            for (size_t k = 0; k < rank; k++) {
                const floats *x = (const floats *)(packed + k * width);
                for (int r = 0; r < ROWS; r++) {
                    const float factor = left[(row + r) * rank + k];
                    even[r] += factor * x[0];
                    odd[r] += factor * x[1];
                }
            }
            for (int r = 0; r < ROWS; r++) {
                const size_t at = (row + r) * columns + column;
                floats low = even[r] * scaling, high = odd[r] * scaling;
                words pairs, a, b;
                /* Through memory: the product is rounded before it is added, as PEFT's is. */
                __asm__("" : "+m"(low), "+m"(high));
                memcpy(&pairs, base + at, sizeof pairs);
                a = (words)((floats)(pairs << 16) + low);
                b = (words)((floats)(pairs & 0xffff0000u) + high);
                /* The upper bit is set by what is not finite, or rounds to what is not. */
                top |= ((a & 0x7fffffffu) + 0x00808000u) | ((b & 0x7fffffffu) + 0x00808000u);
                a += 0x7fffu + ((a >> 16) & 1u); /* to the nearest, ties to even */
                b += 0x7fffu + ((b >> 16) & 1u);
                pairs = (a >> 16) | (b & 0xffff0000u);
                memcpy(out + at, &pairs, sizeof pairs);
            }
        }
    }
    for (int lane = 1; lane < LANES; lane++)
        top[0] |= top[lane];
    return (int)(top[0] >> 31);
}
