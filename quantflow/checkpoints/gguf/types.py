"""ggml's types of tensors: which are read, and what their blocks take."""

from __future__ import annotations

from quantflow.checkpoints.gguf.superblocks import SUPERBLOCK_TYPES

BLOCK = 32  # weights

PLAIN_TYPES = {0: "F32", 1: "F16", 30: "BF16"}

# ggml's number of a type -> its name, and the bytes of a block of 32 weights
BLOCK_TYPES = {2: ("q4_0", 18), 3: ("q4_1", 20), 8: ("q8_0", 34)}

OTHER_TYPES = {  # which are not read
    6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

READ_TYPES = ", ".join(
    [
        *PLAIN_TYPES.values(),
        *(name.upper() for name, _ in BLOCK_TYPES.values()),
        *(n for n, _ in SUPERBLOCK_TYPES.values()),
    ]
)
