"""Weights sharded over ranks become one Hugging Face folder, in bounded memory.

Every format is read into one plan: each tensor's name, shape and pieces, where a piece is a run
of bytes in some file and the box of the tensor that it fills (``pieces``). What differs:

::

    dcp.py        torch.distributed.checkpoint: .metadata + __<rank>_<n>.distcp
    hfstorage.py  its safetensors storage: shard-<rank>-….safetensors, offsets in the headers
    ranks.py      Hugging Face shards spread over ranks
    zero.py       DeepSpeed ZeRO 1, 2, 3 and the universal format
    dtensors.py   verl's: pickles of DTensors, a file a rank
    megatron.py   Megatron-Core's fused and stacked tensors, as views of what dcp.py reads
    titan.py      torchtitan's and torchtune's names and order of rows, likewise
    refused.py    what is known and not served: Megatron's files by rank, an optimizer alone

A model's own names come from transformers (``expected``), in a process beside this one
(``learning``). Pickles are read by ``unpickling``, which builds what ``allowed`` lists and nothing
else; tensors inside them are only described, and their bytes are read by range (``archive``).
"""
