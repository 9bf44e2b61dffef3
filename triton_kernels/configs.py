"""Tile sizes, the only place that has any: direction x products x features, one entry per architecture.

16 bits on sm_90: timed on an H200 (bench/results/nvidia-h200-tiles.json, `python -m bench tune`). The rest was found by
compiling (tools/gate.py), the largest tiles without spills in the register-hungriest of the usual calls, and has not
been timed; contrastive_ext.autotune times others on request. Where a tile has a third number, features come in chunks
of so many.
"""

from __future__ import annotations

from typing import NamedTuple

RESIDENT_FEATURES = 256  # up to here a row tile is loaded once and all its features stay
DIRECTIONS = ("forward", "backward")
FEATURES = (64, 128, 256, 1024)  # the largest number of features of a line; the last stands for all above 256
ARCHITECTURES = (80, 86, 90, 100)
# Tiles come by tensor descriptors, the copy engine's, from this architecture on for these products.
DESCRIPTORS_FROM, DESCRIBED = 90, ("16-bit", "tf32", "split")
# What keeps masks and counters beside every tile spills in larger ones. Ids and diagnostics need 32 columns. With a
# gradient to sum up too, lists with their cursors need half the rows and a gate, one more product, 16 columns.
LARGEST_MASKED = {
    ("forward", "ids"): (128, 32),
    ("forward", "lists"): (128, 32),
    ("forward", "gate"): (128, 32),
    ("backward", "ids"): (128, 32),
    ("backward", "lists"): (64, 32),
    ("backward", "gate"): (64, 16),
    ("top_columns", "ids"): (64, 32),  # any rule of a single row
}
MANY_WARPS = 8
# a second exponent has exponentials, sums and coefficients of its own
LARGEST_OF_TWO = {
    ("forward", False): (128, 64),
    ("forward", True): (128, 128),
    ("backward", False): (128, 32),
    ("backward", True): (128, 64),
}
# of sums over pairs: beside a logit stand its softplus and its sigmoid, beside a sum its sigmoid
LARGEST_OF_SUMS = {"forward": (128, 32), "backward": (128, 64)}
# rows of a masked or ranked backward with 129 to 256 features: their sums alone take half of the registers
LARGEST_WIDE = {"16-bit": 64, "tf32": 32}
# features of a chunk of a gate's second product: with the other number its exact products spill
GUIDE_FEATURES = {80: 16, 86: 16, 90: 32, 100: 32}
# Weights by rank hold bins and edges of two histograms beside the tile: 128x32 spills 440 bytes, 64x32 spills 8.
RANKED_TILE = (64, 16)
PAIRS_OF_THREAD = (16, 128)  # fewer leave the units idle, more never fit the registers


class Config(NamedTuple):
    """Rows and columns of a tile, features of a chunk (0: all), warps of a program, stages of its pipeline.

    registers  the most a thread may have, so that more programs share a processor; 0: as many as there are
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    registers: int = 0


class Line(NamedTuple):
    """A line of the table: `features` the largest number it stands for, `architecture` 0 in the interpreter."""

    direction: str
    products: str
    features: int
    architecture: int


def tile(size: str, warps: int | str, stages: int | str) -> Config:
    """The tile written "rows x columns" or "rows x columns x features of a chunk"."""
    rows, columns, *chunk = map(int, size.split("x"))
    return Config(rows, columns, chunk[0] if chunk else 0, int(warps), int(stages))


def _table(*lines: tuple[Config, Config, Config, Config]) -> dict[tuple[int, int], Config]:
    return {
        (f, a): c for f, line in zip(FEATURES, lines, strict=False) for a, c in zip(ARCHITECTURES, line, strict=True)
    }


def _everywhere(*lines: Config) -> dict[tuple[int, int], Config]:
    return _table(*((line, line, line, line) for line in lines))


# fmt: off
_TABLE = {
    # sm_86 stands for everything with 99 KiB of shared memory. A thread of sm_100 holds whole rows of a tile: masked
    # tiles need twice the registers there, hence half the columns.
    ("forward", "16-bit"): _table(
        #        sm_80                        sm_86                        sm_90                        sm_100
        # sm_90: of programs with 4 warps two share a processor, one multiplies while the other takes exponentials
        (tile("128x128", 8, 3),    tile("128x128", 8, 2),    tile("256x64", 4, 2),     tile("64x64", 4, 3)),
        (tile("128x128", 8, 3),    tile("128x128", 8, 2),    tile("256x64", 4, 2),     tile("128x64", 8, 3)),
        # two stages: three do not fit beside 128 resident rows
        (tile("128x128", 8, 2),    tile("64x64", 8, 2),      tile("128x64", 4, 2),     tile("128x64", 8, 2)),
        # 128x256 spills 24 bytes in masked tiles
        (tile("128x128x64", 8, 3), tile("128x128x32", 8, 3), tile("128x128x64", 4, 4), tile("128x64x64", 8, 4)),
    ),
    ("backward", "16-bit"): _table(
        # 128 columns leave no register for a second exponent
        (tile("128x64", 8, 3),     tile("128x64", 8, 2),     tile("64x64", 4, 3),      tile("128x64", 8, 3)),
        (tile("64x64", 4, 3),      tile("64x64", 4, 2),      tile("64x64", 4, 2),      tile("128x64", 8, 3)),
        # the accumulator alone takes 128 registers
        (tile("64x64", 8, 2),      tile("64x32", 8, 2),      tile("64x64", 4, 2),      tile("128x32", 8, 3)),
        # weights are stored, not summed: 128 columns spill 500 bytes
        (tile("128x64x64", 8, 3),  tile("128x64x32", 8, 3),  tile("256x64x64", 8, 4),  tile("128x64x32", 8, 4)),
    ),
    ("forward", "tf32"): _table(
        (tile("128x128", 8, 2),    tile("128x64", 8, 2),     tile("128x128", 8, 2),    tile("128x64", 8, 2)),
        # float32 rows are twice as long: half the columns of 16 bits
        (tile("128x64", 8, 2),     tile("64x64", 8, 1),      tile("128x64", 8, 2),     tile("128x64", 8, 2)),
        (tile("64x64", 8, 2),      tile("32x32", 4, 1),      tile("64x64", 8, 2),      tile("64x64", 8, 2)),
        (tile("64x64x32", 8, 3),   tile("64x64x32", 8, 3),   tile("128x128x32", 8, 3), tile("128x64x32", 8, 3)),
    ),
    ("backward", "tf32"): _table(
        (tile("64x32", 8, 2),      tile("64x32", 8, 2),      tile("128x64", 8, 2),     tile("64x64", 8, 2)),
        (tile("64x32", 8, 2),      tile("64x32", 8, 1),      tile("64x64", 8, 2),      tile("64x32", 8, 2)),
        (tile("64x32", 8, 1),      tile("32x32", 8, 1),      tile("64x32", 8, 1),      tile("64x32", 8, 1)),
        (tile("64x64x32", 8, 3),   tile("64x64x32", 8, 3),   tile("64x64x32", 8, 3),   tile("64x64x32", 8, 3)),
    ),
    # operands of two fp16 parts, three products of each: up to 256 features
    ("forward", "split"): _table(
        (tile("64x64", 4, 2),      tile("64x64", 4, 2),      tile("128x64", 4, 2),     tile("64x64", 4, 2)),
        (tile("64x64", 4, 2),      tile("64x32", 8, 1),      tile("128x64", 4, 2),     tile("64x64", 4, 2)),
        (tile("32x16", 4, 1),      tile("32x16", 4, 1),      tile("64x64", 4, 2),      tile("32x16", 4, 1)),
    ),
    ("backward", "split"): _table(
        (tile("64x32", 8, 2),      tile("64x32", 8, 2),      tile("64x64", 4, 2),      tile("64x64", 8, 2)),
        (tile("64x64", 8, 1),      tile("64x32", 8, 1),      tile("64x64", 4, 2),      tile("64x32", 8, 2)),
        # sm_100: of 64 rows Triton 3.6 and 3.8 leave an empty kernel
        (tile("32x32", 8, 1),      tile("32x32", 8, 1),      tile("32x32", 8, 1),      tile("32x16", 8, 1)),
    ),
    # exact float32 products run on the ordinary units, operands pass through registers: small tiles, one for all
    ("forward", "ieee"): _everywhere(
        tile("64x64", 8, 2), tile("64x64", 8, 1), tile("32x32", 8, 1), tile("64x32x32", 8, 2),
    ),
    ("backward", "ieee"): _everywhere(
        tile("64x32", 8, 2), tile("32x32", 8, 1), tile("32x32", 8, 1), tile("64x32x32", 8, 2),
    ),
    # for checks, not for speed
    ("forward", "fp64"): _everywhere(
        tile("32x32", 4, 2), tile("32x32", 4, 1), tile("16x16", 4, 1), tile("32x32x32", 4, 2),
    ),
    ("backward", "fp64"): _everywhere(
        tile("32x32", 8, 1), tile("16x16", 4, 1), tile("16x16", 4, 1), tile("32x32x32", 8, 2),
    ),
    # a list of up to 128 columns stays beside the tile; features always come in chunks
    ("top_columns", "tf32"): _everywhere(*[tile("64x64x32", 8, 3)] * 4),
    ("top_columns", "ieee"): _everywhere(*[tile("64x64x32", 8, 2)] * 4),
    ("top_columns", "fp64"): _everywhere(*[tile("32x32x32", 4, 2)] * 4),
}
# fmt: on

# small enough that test problems have edges, corners and several chunks
_INTERPRETER = {False: tile("32x32", 1, 1), True: tile("32x32x64", 1, 1)}

preferred: dict[Line, Config] = {}  # what autotune found on this device
asked: set[Line] = set()  # since autotune last looked


def choose(
    direction: str, products: str, features: int, architecture: int, mask: str = "images", ranked: bool = False,
    exponents: int = 1, sums: bool = False,
) -> Config:  # fmt: skip
    """The tile for a call.

    products      16-bit, tf32, split (fp16 in two parts), ieee or fp64
    architecture  10 major + minor, 0 interpreted
    mask          the costliest rule beside the images': none (images), ids, lists or gate
    ranked        whether weights are looked up in histograms
    exponents     log-sum-exps of a row
    sums          of softplus over pairs, or their gradient
    """
    group = FEATURES[-1] if features > RESIDENT_FEATURES else next(f for f in FEATURES if features <= f)
    line = Line(direction, products, group, architecture and nearest(architecture))
    asked.add(line)
    config = preferred.get(line) or default(line)
    if architecture == 0:
        return config
    largest = [config[:2], LARGEST_MASKED.get((direction, mask), config[:2])]
    if ranked:
        largest.append(RANKED_TILE)
    if sums:
        largest.append(LARGEST_OF_SUMS[direction])
    if exponents > 1 and products == "16-bit":
        largest.append(LARGEST_OF_TWO[direction, config.block_d > 0])
    rows, columns = (min(sizes) for sizes in zip(*largest, strict=True))
    if direction == "backward" and group == RESIDENT_FEATURES and (ranked or mask != "images"):
        rows = min(rows, LARGEST_WIDE.get(products, rows))
    # what is looked up between two products keeps Triton 3.6 from pipelining them: it does not compile
    stages = 1 if ranked and direction == "backward" and group <= RESIDENT_FEATURES else config.num_stages
    # masks and a second set of sums want the registers of more threads
    two = exponents > 1 and direction == "forward" and features > (64 if products == "split" else 128)
    many = mask != "images" or ranked or two or (sums and direction == "forward")
    warps = max(config.num_warps, MANY_WARPS) if many and products in ("16-bit", "split") else config.num_warps
    return config._replace(block_m=rows, block_n=columns, num_warps=warps, num_stages=stages)


def default(line: Line) -> Config:
    """The table's tile."""
    if line.architecture == 0:
        return _INTERPRETER[line.features > RESIDENT_FEATURES]
    return _TABLE[line.direction, line.products][line.features, line.architecture]


def alternatives(line: Line) -> list[Config]:
    """Other tiles worth timing: half and twice the rows and columns, 4 and 8 warps, one stage more or less, two
    programs on a processor (128 registers for each of 8 warps); triangles need columns <= rows.
    """
    table = default(line)
    rows, columns = ([size // 2, size, 2 * size] for size in table[:2])
    found = (
        table._replace(block_m=m, block_n=n, num_warps=warps, num_stages=stages, registers=registers)
        for m in rows
        for n in columns
        for warps in sorted({table.num_warps, 4, 8})
        for stages in range(max(1, table.num_stages - 1), table.num_stages + 2)
        for registers in ((0, 128) if warps == 8 and line.architecture else (0,))
        if 16 <= n <= m and PAIRS_OF_THREAD[0] <= m * n / (32 * warps) <= PAIRS_OF_THREAD[1]
    )
    return [config for config in found if config != table]


def nearest(architecture: int) -> int:
    """The architecture whose entries serve this one: data-centre chips by generation, the rest by their memory."""
    if architecture in ARCHITECTURES:
        return architecture
    return 100 if 100 < architecture < 120 else 86
