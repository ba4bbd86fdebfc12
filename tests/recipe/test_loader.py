"""Recipes as people write them: what each mistake says and on which line, alone and together, and
what `--set` does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantflow.errors import Problem, RecipeError
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.recipe import AUTO, Recipe, dump, read_recipe
from quantflow.stages.awq import Awq
from quantflow.stages.calibrate import Calibrate
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.gptq import Gptq
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack import Pack
from quantflow.stages.registry import STAGES as KINDS
from quantflow.stages.registry import load_recipe
from quantflow.stages.rtn import Rtn
from quantflow.stages.shard import Shard

GOOD = """\
name: tiny
model: some/model
seed: 0
calibration: {data: demo, samples: 8, seqlen: 64}
weights: {bits: 4, group_size: 32}
stages:
  - calibrate
  - awq: {grid: 4}
  - gptq: {damp: 0.01}
  - kv_qparams
  - pack: {format: compressed-tensors}
  - shard: {tp: 2}
  - evaluate: {data: demo}
"""
# lines of GOOD
NAME, MODEL, SEED, CALIBRATION, WEIGHTS, STAGES, CALIBRATE, AWQ, GPTQ, KV, PACK, SHARD, EVALUATE = (
    range(1, 14)
)


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def edited(line: int, text: str) -> str:
    lines = GOOD.splitlines(keepends=True)
    lines[line - 1] = text and text + "\n"
    return "".join(lines)


# One line of GOOD replaced: the line, what is there instead, the line that is complained about,
# fragments of the complaint.
EDITS: list[tuple[int, str, int, list[str]]] = [
    (NAME, "", 1, ["`name` is missing"]),
    (NAME, "nmae: tiny", 1, ["unknown key `nmae`", "Did you mean `name`?"]),
    (
        NAME,
        "name: no",
        NAME,
        ["`name` is no, which YAML reads as false (a boolean)", "a text", 'Quote it: "no"'],
    ),
    (NAME, "name: 7", NAME, ["`name` is 7", 'Quote it: "7"']),
    (NAME, "name: ../up", NAME, ["`name` is '../up'", "letters, digits"]),
    (NAME, "name: ''", NAME, ["`name` is ''"]),
    (MODEL, "model: [a, b]", MODEL, ["`model` is ['a', 'b'] (a list)", "a text"]),
    (MODEL, "model: ''", MODEL, ["`model` is ''", "a text that is not empty"]),
    (MODEL, "output: 3.5", MODEL, ["`output` is 3.5", "a text"]),
    (MODEL, "modle: x", MODEL, ["unknown key `modle`", "Did you mean `model`?"]),
    (MODEL, "bits: 4", MODEL, ["unknown key `bits`", "belongs under `weights`"]),
    (MODEL, "damp: 0.1", MODEL, ["unknown key `damp`", "belongs under `stages.gptq`"]),
    (
        MODEL,
        "rtn: {}",
        MODEL,
        ["unknown key `rtn`", "`rtn` is a stage: write `- rtn` under `stages`"],
    ),
    (MODEL, "5: x", MODEL, ["unknown key `5`"]),
    (SEED, "seed: -1", SEED, ["`seed` is -1", "greater than or equal to 0"]),
    (SEED, "seed: 1.5", SEED, ["`seed` is 1.5", "an integer"]),
    (SEED, 'seed: "1"', SEED, ["`seed` is '1' (a text)", "an integer", "Remove the quotes"]),
    (SEED, "seed: true", SEED, ["`seed` is true (a boolean)", "an integer"]),
    (CALIBRATION, "calibration: c4", CALIBRATION, ["`calibration` is 'c4' (a text)", "a mapping"]),
    (
        CALIBRATION,
        "calibration: {dataset: demo, data: demo}",
        CALIBRATION,
        ["unknown key `dataset` under `calibration`", "`data`?"],
    ),
    (
        CALIBRATION,
        "calibration: {data: wikitext}",
        CALIBRATION,
        ["'wikitext'", "c4, c4-new, ptb", "`wikitext2`?", "{data: c4, file: "],
    ),
    (
        CALIBRATION,
        "calibration: {data: no/such.txt}",
        CALIBRATION,
        ["'no/such.txt'", "nor a file that exists", "A local file works"],
    ),
    (
        CALIBRATION,
        "calibration: {data: .}",
        CALIBRATION,
        ["`calibration.data` is '.', a directory"],
    ),
    (
        CALIBRATION,
        "calibration: {data: /dev/null}",
        CALIBRATION,
        ["`calibration.data` is '/dev/null', a device", "write it into a file"],
    ),
    (
        CALIBRATION,
        "calibration: {data: c4, file: /dev/null}",
        CALIBRATION,
        ["is '/dev/null': it is a device", "write it into a file"],
    ),
    (
        CALIBRATION,
        "calibration: {data: c4, file: gone.jsonl}",
        CALIBRATION,
        ["`calibration.file` is 'gone.jsonl': there is no such file"],
    ),
    (
        CALIBRATION,
        "calibration: {data: cc4, file: recipe.yaml}",
        CALIBRATION,
        ["'cc4'", "where `file` is given", "Did you mean `c4`?"],
    ),
    (
        CALIBRATION,
        "calibration: {data: on}",
        CALIBRATION,
        ["`calibration.data` is on, which YAML reads as true", 'Quote it: "on"'],
    ),
    (
        CALIBRATION,
        "calibration:\n  data: demo\n  samples: 0",
        6,
        ["`calibration.samples` is 0", "greater than or equal to 1"],
    ),
    (
        CALIBRATION,
        "calibration:\n  data: demo\n  seqlen: 15",
        6,
        ["`calibration.seqlen` is 15", "greater than or equal to 16"],
    ),
    (
        CALIBRATION,
        "calibration: {seqlen: 0}",
        CALIBRATION,
        ["`calibration.seqlen` is 0", "auto, or an integer greater"],
    ),
    (
        CALIBRATION,
        "calibration: {seqlen: max}",
        CALIBRATION,
        ["`calibration.seqlen` is 'max'", "auto, or an integer"],
    ),
    (
        CALIBRATION,
        "calibration: {seqlen: '64'}",
        CALIBRATION,
        ["`calibration.seqlen` is '64'", "Remove the quotes"],
    ),
    (CALIBRATION, "calibration:\n\n  data: demo\n  skip: -1", 7, ["`calibration.skip` is -1"]),
    (
        CALIBRATION,
        "calibration:\n  data: demo\n  seq_len: 64",
        6,
        ["unknown key `seq_len`", "Did you mean `seqlen`?"],
    ),
    (CALIBRATION, "", CALIBRATE - 1, ["calibrate, awq, gptq, kv_qparams need calibration data"]),
    (
        WEIGHTS,
        "weights: {bits: 9}",
        WEIGHTS,
        ["`weights.bits` is 9", "one of 2, 3, 4, 5, 6, 7 or 8"],
    ),
    (
        WEIGHTS,
        'weights: {bits: "4"}',
        WEIGHTS,
        ["`weights.bits` is '4'", "one of 2, 3, 4, 5, 6, 7 or 8"],
    ),
    (WEIGHTS, "weights: {bits: true}", WEIGHTS, ["`weights.bits` is true"]),
    (WEIGHTS, "weights:", WEIGHTS, ["`weights` is empty", "a mapping"]),
    (
        WEIGHTS,
        "weights: {group_size: 0}",
        WEIGHTS,
        ["`weights.group_size` is 0", "-1 (one group a row) or an integer of at least 4"],
    ),
    (WEIGHTS, "weights: {group_size: -2}", WEIGHTS, ["`weights.group_size` is -2"]),
    (
        WEIGHTS,
        "weights: {group_size: 32.5}",
        WEIGHTS,
        ["`weights.group_size` is 32.5", "an integer"],
    ),
    (
        WEIGHTS,
        "weights: {groupsize: 32}",
        WEIGHTS,
        ["unknown key `groupsize` under `weights`", "Did you mean `group_size`?"],
    ),
    (
        WEIGHTS,
        'weights: {symmetric: "yes"}',
        WEIGHTS,
        ["`weights.symmetric` is 'yes'", "true or false"],
    ),
    (
        WEIGHTS,
        "weights: {ignore: lm_head}",
        WEIGHTS,
        ["`weights.ignore` is 'lm_head'", "a list", "Write [lm_head]"],
    ),
    (WEIGHTS, "weights: {ignore: [lm_head, 4]}", WEIGHTS, ["`weights.ignore[1]` is 4", "a text"]),
    (
        WEIGHTS,
        "weights: {overrides: {match: a, bits: 8}}",
        WEIGHTS,
        ["`weights.overrides`", "a list"],
    ),
    (
        WEIGHTS,
        "weights:\n  overrides:\n    - match: a\n      bits: 8\n    - bits: 8",
        9,
        ["`weights.overrides[1].match` is missing"],
    ),
    (
        WEIGHTS,
        "weights:\n  overrides:\n    - match: a\n      bits: 16",
        8,
        ["`weights.overrides[0].bits` is 16"],
    ),
    (
        WEIGHTS,
        "weights:\n  overrides:\n    - match: a",
        7,
        ["`weights.overrides[0]` changes nothing"],
    ),
    (
        WEIGHTS,
        "weights:\n  overrides:\n    - {match: a, ignore: true, bits: 8}",
        7,
        ["gives bits to what it ignores"],
    ),
    (
        CALIBRATE,
        "  - calibrat",
        CALIBRATE,
        ["there is no stage `calibrat`", "Did you mean `calibrate`?"],
    ),
    (
        CALIBRATE,
        "  - calibrate: {samples: 8}",
        CALIBRATE,
        ["unknown key `samples`", "one of route", "belongs under `calibration`"],
    ),
    (CALIBRATE, "  - 3", CALIBRATE, ["`stages[0]` is 3", "a stage's name"]),
    (CALIBRATE, "", KV - 1, ["kv_qparams without calibrate"]),
    (
        CALIBRATE,
        "  - calibrate\n  - calibrate",
        CALIBRATE + 1,
        ["the stage calibrate is given twice"],
    ),
    (
        AWQ,
        "  - awq:\n    grid: 4",
        AWQ,
        ["`stages[1]` is {awq: empty, grid: 4}", "Indent the settings further than `awq`"],
    ),
    (AWQ, "  - {awq: {}, gptq: {}}", AWQ, ["Begin each stage with a dash"]),
    (AWQ, "  - awq: {grid: 0}", AWQ, ["`stages.awq.grid` is 0", "greater than or equal to 1"]),
    (
        AWQ,
        "  - awq: {grd: 4}",
        AWQ,
        ["unknown key `grd` under `stages.awq`", "Did you mean `grid`?"],
    ),
    (AWQ, "  - awq: {clip: 1}", AWQ, ["`stages.awq.clip` is 1", "true or false"]),
    (AWQ, "  - awq: [4]", AWQ, ["`stages.awq` is [4] (a list)", "a mapping"]),
    (AWQ, "  - awq: {max_tokens: 0}", AWQ, ["`stages.awq.max_tokens` is 0"]),
    (
        GPTQ,
        "",
        AWQ,
        ["no stage rounds the weights", "exactly one of gptq, rtn, nf4", "awq only scales"],
    ),
    (GPTQ, "  - gptq\n  - rtn", GPTQ + 1, ["both gptq and rtn round the weights"]),
    (GPTQ, "  - gptq: {damp: 1}", GPTQ, ["`stages.gptq.damp` is 1", "less than 1"]),
    (GPTQ, "  - gptq: {damp: 0}", GPTQ, ["`stages.gptq.damp` is 0", "greater than 0"]),
    (GPTQ, "  - gptq: {damp: .nan}", GPTQ, ["`stages.gptq.damp` is nan", "a finite number"]),
    (
        GPTQ,
        '  - gptq: {damp: "1e-2"}',
        GPTQ,
        ["`stages.gptq.damp` is '1e-2' (a text)", "a number", "Remove the quotes"],
    ),
    (
        GPTQ,
        "  - gptq: {act_order: statc}",
        GPTQ,
        ["`stages.gptq.act_order` is 'statc'", "'none', 'static' or 'dynamic'", "`static`?"],
    ),
    (
        GPTQ,
        "  - gptq: {act_order: off}",
        GPTQ,
        ["`stages.gptq.act_order` is off, which YAML reads as false"],
    ),
    (GPTQ, "  - gptq: {refine: 101}", GPTQ, ["`stages.gptq.refine` is 101"]),
    (
        GPTQ,
        "  - gptq: {refine: -1}",
        GPTQ,
        ["`stages.gptq.refine` is -1", "greater than or equal to 0"],
    ),
    (GPTQ, "  - gptq: {dampening: 0.1}", GPTQ, ["unknown key `dampening`", "Did you mean `damp`?"]),
    (KV, "  - kv_qparams: {bits: 4}", KV, ["`stages.kv_qparams.bits` is 4", "8"]),
    (
        KV,
        "  - kv_qparams: {granularity: layer}",
        KV,
        ["`stages.kv_qparams.granularity` is 'layer'", "'tensor', 'head' or 'channel'"],
    ),
    (KV, "  - kv-qparams", KV, ["there is no stage `kv-qparams`", "Did you mean `kv_qparams`?"]),
    (PACK, "", STAGES, ["no stage writes a checkpoint"]),
    (PACK, "  - pack", PACK, ["`stages.pack.format` is missing"]),
    (PACK, "  - pack: {fmt: awq, format: awq}", PACK, ["unknown key `fmt`"]),
    (
        PACK,
        "  - pack: {format: gguv}",
        PACK,
        ["`stages.pack.format` is 'gguv'", "'compressed-tensors', 'awq', 'gptq', 'gptq_v2'"],
    ),
    (PACK, "  - pack: {format: compressed_tensors}", PACK, ["Did you mean `compressed-tensors`?"]),
    (
        PACK,
        "  - pack: {format: awq, kv_scales: true}",
        PACK,
        ["`stages.pack.kv_scales` is true", "fp8 (true wrote int8"],
    ),
    (
        PACK,
        "  - pack: {format: awq, kv_scales: int8}",
        PACK,
        ["`stages.pack.kv_scales` is 'int8'", "'fp8'"],
    ),
    (
        PACK,
        "  - pack: {format: awq}\n  - pack: {format: awq}",
        PACK + 1,
        ["packs the format awq twice"],
    ),
    (
        PACK,
        "  - pack: {format: awq, max_shard_size: 5}",
        PACK,
        ["`stages.pack.max_shard_size` is 5", '"5GB"'],
    ),
    (
        PACK,
        "  - pack: {format: awq, max_shard_size: 5 gigs}",
        PACK,
        ["is '5 gigs'", "a size such as"],
    ),
    (SHARD, "  - shard: {tp: 3}", SHARD, ["`stages.shard.tp` is 3", "one of 2, 4, 8"]),
    (SHARD, "  - shard: {tp: 1}", SHARD, ["`stages.shard.tp` is 1"]),
    (SHARD, "  - shard", SHARD, ["`stages.shard.tp` is missing"]),
    (
        EVALUATE,
        "  - evaluate: {data: gone.txt}",
        EVALUATE,
        ["'gone.txt'", "`evaluate: {data: c4, file: ./c4.jsonl}`"],
    ),
    (
        EVALUATE,
        "  - evaluate: {data: demo, windows: 0}",
        EVALUATE,
        ["`stages.evaluate.windows` is 0"],
    ),
    (
        EVALUATE,
        "  - evaluate: {data: demo, length: 1}",
        EVALUATE,
        ["`stages.evaluate.length` is 1"],
    ),
    (
        EVALUATE,
        "  - evaluate: {data: demo, gates: {kl: 1}}",
        EVALUATE,
        ["`kl` under `stages.evaluate.gates`", "kl_mean, kl_p99"],
    ),
    (
        EVALUATE,
        "  - evaluate:\n      data: demo\n      gates:\n        top1: 90",
        16,
        ["gates.top1` is 90", "less than or equal to 1"],
    ),
    (
        EVALUATE,
        "  - evaluate: {data: demo, gates: {kl_mean: 0}}",
        EVALUATE,
        ["`stages.evaluate.gates.kl_mean` is 0", "greater than 0"],
    ),
    (
        EVALUATE,
        "  - evaluate: {data: demo, gates: {perplexity_ratio: 0.9}}",
        EVALUATE,
        ["perplexity_ratio` is 0.9"],
    ),
    (
        EVALUATE,
        "  - evalute: {data: demo}",
        EVALUATE,
        ["there is no stage `evalute`", "Did you mean `evaluate`?"],
    ),
]


@pytest.mark.parametrize(
    ("line", "text", "expected_line", "fragments"),
    EDITS,
    ids=[f"{line}-{text[:50]}" for line, text, _, _ in EDITS],
)
def test_a_mistake_is_one_problem_on_its_line(
    line: int,
    text: str,
    expected_line: int,
    fragments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, edited(line, text))
    (problem,) = problems_of(path)
    assert problem.where == f"{path}:{expected_line}"
    for fragment in fragments:
        assert fragment in str(problem)


# Whole files: what they hold, the line that is complained about (0: none), fragments of the
# complaint.
FILES: list[tuple[str, bytes, int, list[str]]] = [
    ("empty", b"", 0, ["is empty", "a recipe"]),
    ("comments", b"# nothing\n\n", 0, ["is empty"]),
    ("list", b"# a list\n- name: x\n- stages: []\n", 2, ["a list", "at the top level"]),
    ("text", b"just words\n", 1, ["'just words' (a text) at the top level"]),
    ("number", b"4", 1, ["holds 4 (an integer) at the top level"]),
    ("tab", b"name: x\nweights:\n\tbits: 4\n", 3, ["cannot be read as YAML", "no tabs"]),
    ("unclosed", b"name: x\nweights: {bits: 4\nstages: []\n", 3, ["cannot be read as YAML"]),
    ("unclosed at the end", b"name: x\nweights: {bits: 4\n", 3, ["cannot be read as YAML"]),
    (
        "colon",
        b"name: a: b\n",
        1,
        ["mapping values are not allowed", 'quote a text that contains ": "'],
    ),
    (
        "unquoted star",
        b"name: x\nweights:\n  overrides: [{match: *.down_proj, bits: 8}]\n",
        3,
        ['"*.down_proj"'],
    ),
    ("unknown alias", b"name: *x\n", 1, ["undefined alias"]),
    ("two documents", b"name: x\n---\nname: y\n", 2, ["One file holds one recipe"]),
    (
        "duplicate key",
        b"name: x\nseed: 1\nname: y\n",
        3,
        ["the key `name` is given twice, first on line 1"],
    ),
    (
        "duplicate deep",
        b"stages:\n  - awq:\n      grid: 1\n      grid: 2\n",
        4,
        ["the key `grid` is given twice, first on line 3"],
    ),
    (
        "not a plain value",
        b"name: !!python/object/apply:os.mkdir [pwned]\n",
        1,
        ["could not determine a constructor", "no tags"],
    ),
    ("a list as a key", b"name: x\n? [a]\n: b\n", 2, ["unhashable key"]),
    ("binary", b"\x93NUMPY\x01\x00v\x00", 1, ["is not UTF-8 text"]),
    ("latin 1", b"name: x\nmodel: caf\xe9\n", 2, ["is not UTF-8 text"]),
    ("zeros", b"name\0: x", 0, ["is a binary file"]),
    ("control character", b"name: x\nmodel: \x07\n", 2, ["special characters are not allowed"]),
    ("too large", b"# \n" * 2**19, 0, ["is larger than"]),
    ("too deep", b"name: " + b"[" * 5000, 0, ["is nested too deeply"]),
    ("too long a number", b"seed: " + b"9" * 5000, 0, ["cannot be read as YAML"]),
    (
        "merges of merges",
        b"x0: &m0 {a: 1}\n"
        + b"".join(b"x%d: &m%d {<<: [*m%d, *m%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
        11,
        ["a mapping of more than 1000 keys"],
    ),
    (
        "many keys",
        b"".join(b"k%d: 1\n" % i for i in range(2000)),
        1,
        ["a mapping of more than 1000 keys"],
    ),
    (
        "many stages",
        b"name: x\nmodel: m\nstages:\n" + b"- rtn\n" * 20_000,
        3,
        ["20000 stages; expected at most 100"],
    ),
    (
        "endless alias",
        b"name: &a [*a]\nstages: [rtn, pack: {format: gptq}]\n",
        1,
        ["`name` is [a list]"],
    ),
]


def test_an_alias_that_doubles_a_text_forty_times(tmp_path: Path) -> None:
    """Its text was made for the default output: half a gigabyte at twenty-six times."""
    doubled = "".join(f"x{i}: &m{i} [*m{i - 1}, *m{i - 1}]\n" for i in range(1, 40))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"x0: &m0 [1]\n{doubled}name: *m39\n")
    assert any("`name` is [a list, a list]" in str(problem) for problem in problems_of(path))


@pytest.mark.parametrize(
    ("content", "line", "fragments"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_a_file_that_is_no_recipe(
    content: bytes, line: int, fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.where == (f"{path}:{line}" if line else str(path))
    for fragment in fragments:
        assert fragment in str(problem)
    assert os.listdir(tmp_path) == ["recipe.yaml"]  # nothing was executed


def test_no_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (problem,) = problems_of(tmp_path / "recpie.yaml")
    assert (
        str(problem)
        == f"{tmp_path}/recpie.yaml: there is no such file; expected a recipe, one YAML file. Did"
        " you mean `recipe.yaml`?"
    )
    (problem,) = problems_of(tmp_path / "nowhere" / "recipe.yaml")
    assert problem.found == "there is no such file"
    (problem,) = problems_of(tmp_path)
    assert (problem.found, problem.hint) == ("is a directory", "It holds recipe.yaml")
    (problem,) = problems_of("a\0b")
    assert problem.where == "a\0b"


# Recipes with several things wrong that only show together.
TOGETHER: list[tuple[str, str, list[tuple[int, str]]]] = [
    (
        "wrong order",
        "name: x\ncalibration: {data: demo}\nstages:\n- gptq\n- awq\n- pack: {format: awq}\n",
        [(5, "awq comes after gptq")],
    ),
    (
        "pack first",
        "name: x\nstages:\n- pack: {format: awq}\n- rtn\n",
        [(4, "rtn comes after pack")],
    ),
    (
        "shard, then pack",
        "name: x\nstages:\n- rtn\n- shard: {tp: 2}\n- pack: {format: gptq}\n",
        [(5, "pack comes after shard")],
    ),
    (
        "kv before rounding",
        (
            "name: x\ncalibration: {data: demo}\nstages: [calibrate, kv_qparams, rtn, pack:"
            " {format: awq}]\n"
        ),
        [(3, "rtn comes after kv")],
    ),
    ("nothing to do", "name: x\nstages: []\n", [(2, "no stage rounds"), (2, "no stage writes")]),
    ("no stages", "name: x\n", [(1, "`stages` is missing")]),
    (
        "stages as a mapping",
        "name: x\nstages:\n  rtn: {}\n",
        [(2, "`stages` is {rtn: a mapping} (a mapping); expected a list")],
    ),
    (
        "gptq alone",
        "name: x\nstages:\n- gptq\n- pack: {format: gptq}\n",
        [(3, "gptq needs calibration data")],
    ),
    (
        "no calibration",
        "name: x\ncalibration:\nstages:\n- awq\n- rtn\n- pack: {format: awq}\n",
        [(4, "awq needs calibration data")],
    ),
    (
        "awq in 3 bits",
        "name: x\nweights:\n  bits: 3\nstages:\n- rtn\n- pack: {format: awq}\n",
        [(6, "the format awq cannot hold 3 bits (`weights.bits`")],
    ),
    (
        "awq mixed",
        (
            "name: x\nweights:\n  overrides:\n  - {match: a, bits: 4}\n  - {match: b, bits:"
            " 8}\nstages:\n- rtn\n- pack: {format: awq}\n"
        ),
        [(8, "the format awq cannot hold 8 bits (`weights.overrides[1].bits`")],
    ),
    (
        "gptq in 5 bits",
        "name: x\nweights: {bits: 5}\nstages:\n- rtn\n- pack: {format: gptq}\n",
        [(5, "the format gptq cannot hold 5 bits (`weights.bits`")],
    ),
    (
        "compressed-tensors and g_idx",
        (
            "name: x\ncalibration: {data: demo}\nstages:\n- gptq: {act_order: dynamic}\n- pack:"
            " {format: compressed-tensors}\n"
        ),
        [(5, "the format compressed-tensors cannot hold act_order: dynamic")],
    ),
    (
        "awq and g_idx",
        (
            "name: x\ncalibration: {data: demo}\nstages:\n- gptq: {act_order: dynamic}\n- pack:"
            " {format: gptq}\n- pack: {format: awq}\n"
        ),
        [(6, "the format awq cannot hold act_order: dynamic")],
    ),
    (
        "rounded twice, backwards",
        "name: x\ncalibration: {data: demo}\nstages: [rtn, gptq, pack: {format: awq}]\n",
        [(3, "both gptq and rtn")],
    ),
    (
        "unknown stage",
        "name: x\nstages:\n- smoothquant\n- pack: {format: gptq}\n",
        [(3, "there is no stage `smoothquant`")],
    ),
    (
        "evaluated twice",
        (
            "name: x\nstages:\n- rtn\n- pack: {format: awq}\n- evaluate: {data: c4}\n- evaluate:"
            " {data: ptb}\n"
        ),
        [(6, "evaluate is given twice")],
    ),
    (
        "everything",
        """\
name: no
sede: 1
calibration: {data: c5, samples: many}
weights:
  bits: 16
  overrides:
    - match: x
stages:
  - awk: {grid: 20}
  - gptq: {damp: 3, actorder: static}
  - calibrate
  - pack: {format: gptq}
  - pack: {format: gptq}
  - shard: {tp: 7}
""",
        [
            (1, "`name` is no, which YAML reads as false"),
            (2, "Did you mean `seed`?"),
            (3, "'c5', neither a known data set"),
            (3, "`calibration.samples` is 'many' (a text); expected an integer"),
            (5, "`weights.bits` is 16"),
            (7, "`weights.overrides[0]` changes nothing"),
            (9, "Did you mean `awq`?"),
            (10, "`stages.gptq.damp` is 3; expected less than 1"),
            (10, "Did you mean `act_order`?"),
            (11, "calibrate comes after awq"),
            (13, "packs the format gptq twice"),
            (14, "`stages.shard.tp` is 7"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in TOGETHER], ids=[case[0] for case in TOGETHER]
)
def test_all_problems_at_once(text: str, expected: list[tuple[int, str]], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    problems = problems_of(path)
    assert [p.where for p in problems] == [f"{path}:{line}" for line, _ in expected], "\n".join(
        map(str, problems)
    )
    for line, fragment in expected:
        assert any(fragment in str(p) for p in problems if p.where == f"{path}:{line}"), "\n".join(
            map(str, problems)
        )


def test_the_good_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.stages == (
        Calibrate(),
        Awq(grid=4, clip=True, max_tokens=8192),
        Gptq(act_order="static", damp=0.01, range_search=True),
        KvQparams(bits=8, symmetric=False, granularity="tensor"),
        Pack(format="compressed-tensors", max_shard_size=5_000_000_000),
        Shard(tp=2),
        Evaluate(data="demo", windows=64, skip=0),
    )
    assert (recipe.name, recipe.model, recipe.output, recipe.seed) == (
        "tiny",
        "some/model",
        "artifacts/tiny",
        0,
    )
    assert recipe.calibration is not None and (
        recipe.calibration.samples,
        recipe.calibration.skip,
    ) == (8, 0)
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.weights.ignore) == (
        4,
        32,
        ("lm_head",),
    )
    assert [stage.name for stage in recipe.stages] == [
        "calibrate",
        "awq",
        "gptq",
        "kv_qparams",
        "pack",
        "shard",
        "evaluate",
    ]
    assert hash(recipe) == hash(load_recipe(tmp_path / "recipe.yaml"))


def test_rtn_needs_no_calibration(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, "name: x\nstages: [rtn, pack: {format: gptq_v2}, pack: {format: gptq}]\n")
    )
    assert recipe.stages[0] == Rtn(range_search=False)
    assert recipe.calibration is None and recipe.model is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1E-2", 0.01),
        ("5e-1", 0.5),
        (".5", 0.5),
        ("0.010", 0.01),
        ("1.e-1", 0.1),
        ("+2.5e-01", 0.25),
    ],
)
def test_numbers_are_read_as_people_mean_them(text: str, value: float, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, edited(GPTQ, f"  - gptq: {{damp: {text}}}")))
    assert recipe.stages[2] == Gptq(damp=value)


def test_yaml_1_1_surprises(tmp_path: Path) -> None:
    text = (
        edited(SEED, "seed: 010\noutput: 2024-02-30")
        .replace("{grid: 4}", "{grid: 1_000, clip: off}")
        .replace("some/model", "12:30")
    )
    recipe = load_recipe(write(tmp_path, "\ufeff" + text))
    assert recipe.seed == 10  # YAML 1.1: octal, 8
    assert recipe.output == "2024-02-30"  # YAML 1.1: a date, which does not exist
    assert recipe.model == "12:30"  # YAML 1.1: 750
    assert recipe.stages[1] == Awq(grid=1000, clip=False)


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("5GB", 5_000_000_000),
        ("512MiB", 536_870_912),
        ("1.5 GiB", 1_610_612_736),
        ("2048", 2048),
        ("2000 kb", 2_000_000),
        ("1TB", 10**12),
    ],
)
def test_sizes(size: str, number: int, tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, edited(PACK, f"  - pack: {{format: gptq, max_shard_size: {size}}}"))
    )
    assert recipe.stages[4] == Pack(format="gptq", max_shard_size=number)


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = (
        "name: x\nweights: &w {bits: 8}\nstages:\n- rtn\n- pack: &p {format: gptq}\n- pack: {<<:"
        " *p, format: gptq_v2}\n"
    )
    assert [s.format for s in load_recipe(write(tmp_path, text)).stages if isinstance(s, Pack)] == [
        "gptq",
        "gptq_v2",
    ]


# Files


def test_data_is_looked_for_in_three_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tiny_model").mkdir()
    text = GOOD.replace("data: demo, samples", "data: a.txt, samples").replace(
        "{data: demo}", "{data: c4, file: b.jsonl}"
    )
    path = write(tmp_path / "recipes", text.replace("some/model", "tiny_model"))
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path / "elsewhere")

    def found(*overrides: str) -> tuple[str, str | None, str | None]:
        recipe = load_recipe(path, overrides)
        evaluate = recipe.stages[-1]
        assert isinstance(evaluate, Evaluate) and recipe.calibration is not None
        return recipe.calibration.data, evaluate.file, recipe.model

    top = str(tmp_path)
    assert found() == (f"{top}/a.txt", f"{top}/b.jsonl", f"{top}/tiny_model")
    (tmp_path / "recipes" / "a.txt").write_text("nearer")
    assert found() == (f"{top}/recipes/a.txt", f"{top}/b.jsonl", f"{top}/tiny_model")
    (tmp_path / "elsewhere" / "a.txt").write_text("nearest")
    assert found() == ("a.txt", f"{top}/b.jsonl", f"{top}/tiny_model")
    # said on the command line, a model is where the user is, or on the hub
    assert load_recipe(path, model="tiny_model").model == "tiny_model"
    assert load_recipe(path, ["model=tiny_model"]).model == "tiny_model"


# The command line


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    said = [
        "stages.gptq.damp=5e-2",
        "stages.gptq.act_order=none",
        "stages.calibrate={}",
        "stages.kv_qparams.granularity=head",
        "stages.pack.format=gptq_v2",
        "stages.6.gates.kl_mean=1",
        "stages.evaluate.windows = 3",
        "calibration.samples=16",
        "calibration.samples=32",
        "weights.bits=3",
        "weights.ignore=[lm_head, '*.q_proj']",
        "weights.overrides=[{match: a, bits: 8}]",
        "weights.overrides.0.group_size=-1",
        "seed=7",
        "name=other",
    ]
    recipe = load_recipe(path, said, model="./here", output="out")
    assert recipe.stages[2] == Gptq(damp=0.05, act_order="none")
    assert recipe.stages[3] == KvQparams(granularity="head")
    assert recipe.stages[4] == Pack(format="gptq_v2")
    evaluate = recipe.stages[6]
    assert (
        isinstance(evaluate, Evaluate) and evaluate.gates.kl_mean == 1.0 and evaluate.windows == 3
    )
    assert recipe.calibration is not None and recipe.calibration.samples == 32
    assert recipe.weights.model_dump()["overrides"] == (
        {"match": "a", "bits": 8, "group_size": -1, "symmetric": None, "ignore": False},
    )
    assert recipe.weights.ignore == ("lm_head", "*.q_proj")
    assert (recipe.weights.bits, recipe.seed, recipe.name, recipe.model, recipe.output) == (
        3,
        7,
        "other",
        "./here",
        "out",
    )
    assert load_recipe(path, ["name=other"]).output == "artifacts/other"
    assert load_recipe(path, ["output=a"], output="b").output == "b"


def test_overrides_make_the_sections_they_need(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nstages: [gptq, pack: {format: gptq}]\n")
    recipe = load_recipe(
        path, ["calibration.data=demo", "weights.group_size=64", "stages.gptq.refine=5"]
    )
    assert recipe.calibration is not None and recipe.calibration.data == "demo"
    assert recipe.weights.group_size == 64
    assert recipe.stages[0] == Gptq(refine=5)


def test_an_override_changes_one_of_two_aliased_sections(tmp_path: Path) -> None:
    text = (
        "name: x\nweights: {overrides: [&o {match: a, bits: 8}, *o]}\nstages: [rtn, pack: {format:"
        " gptq}]\n"
    )
    recipe = load_recipe(write(tmp_path, text), ["weights.overrides.1.match=b"])
    assert [override.match for override in recipe.weights.overrides] == ["a", "b"]


SETS: list[tuple[str, list[str]]] = [
    ("stages.gptq.dmap=0.1", ["unknown key `dmap`", "Did you mean `damp`?"]),
    ("stages.gptq.damp=2", ["`stages.gptq.damp` is 2", "less than 1"]),
    ("stages.gptq.damp=high", ["`stages.gptq.damp` is 'high' (a text)", "a number"]),
    ("stages.gptq.damp.x=1", ["`stages.gptq.damp` has no settings of its own"]),
    ("stages.rtn.range_search=true", ["the recipe has no stage `rtn`", "calibrate, awq, gptq"]),
    ("stages.gtpq.damp=0.1", ["there is no stage `gtpq`", "Did you mean `gptq`?"]),
    ("stages.7.damp=0.1", ["there is no stage 7", "from 0 to 6"]),
    ("stages.calibrate.samples=4", ["unknown key `samples`", "belongs under `calibration`"]),
    ("weight.bits=3", ["unknown key `weight`", "Did you mean `weights`?"]),
    ("weights.bits=9", ["`weights.bits` is 9", "2, 3, 4, 5, 6, 7 or 8"]),
    ("weights.overrides.0.bits=8", ["`weights.overrides` is a list of 0"]),
    ("weights.ignore.x=8", ["`weights.ignore` is a list of 0", "not `x`"]),
    ("weights=4", ["`weights` is 4 (an integer)", "a mapping"]),
    ("calibration.data=gone.txt", ["'gone.txt', neither"]),
    ("seed", ["is not an assignment", "stages.gptq.damp=0.05"]),
    ("=4", ["is not an assignment"]),
    ("weights..bits=4", ["is not an assignment"]),
    ("weights.ignore=[a", ["cannot be read as YAML"]),
    ("weights={bits: 4, bits: 8}", ["the key `bits` is given twice"]),
    ("name=", ["`name` is empty", "a text"]),
]


@pytest.mark.parametrize(("text", "fragments"), SETS, ids=[text for text, _ in SETS])
def test_a_mistake_on_the_command_line(text: str, fragments: list[str], tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, GOOD), text)
    assert problem.where == f"--set {text}"
    for fragment in fragments:
        assert fragment in str(problem)


def test_mistakes_of_the_command_line_come_after_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, edited(SEED, "seed: -1"))
    problems = problems_of(path, "weights.bits=9", "stages.gptq.dmap=1")
    assert [p.where for p in problems] == [
        f"{path}:3",
        "--set stages.gptq.dmap=1",
        "--set weights.bits=9",
    ]


def test_two_stages_of_a_name_are_told_apart_by_position(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nstages: [rtn, pack: {format: gptq}, pack: {format: awq}]\n")
    (problem,) = problems_of(path, "stages.pack.format=gptq_v2")
    assert (problem.found, problem.expected) == (
        "the recipe has 2 stages `pack`",
        "a position, stages.1 or stages.2",
    )
    recipe = load_recipe(path, ["stages.1.format=gptq_v2"])
    assert [s.format for s in recipe.stages if isinstance(s, Pack)] == ["gptq_v2", "awq"]


@pytest.mark.parametrize(("option", "value"), [("model", ""), ("output", "")])
def test_empty_options(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), **{option: value})
    (problem,) = caught.value.problems
    assert problem.where == f"--{option} " and "not empty" in problem.expected


# Anything


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mangled_recipe_gives_a_recipe_or_a_recipe_error(
    data: st.DataObject, tmp_path: Path
) -> None:
    """Cuts, repeats and inserts pieces of a good recipe and of YAML's syntax: nothing else than
    RecipeError may come out."""
    text = GOOD
    syntax = "{ } [ ] &a *a null true 4 1e400 ? | > \" ' --- awq overrides".split()
    pieces = [
        *syntax, ": ", "- ", "<<: ", "\n", "\n  ", "!!int ", "!!bool ", "!!set ", "!!timestamp ",
    ]  # fmt: skip
    sets = [
        "weights.bits=3",
        "stages.gptq.damp=0.1",
        "stages.4.format=awq",
        "calibration.samples=1",
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 30))
        text = (
            text[:start]
            + data.draw(st.sampled_from([*pieces, text[start : start + length]]))
            + text[start + length :]
        )
    overrides = data.draw(st.lists(st.sampled_from(sets)))
    try:
        assert isinstance(load_recipe(write(tmp_path, text), overrides), Recipe)
    except RecipeError as error:
        assert error.problems and all(p.where and p.found for p in error.problems)


def test_what_is_not_named_is_bundled_and_fits_the_model(tmp_path: Path) -> None:
    """One recipe for any model: texts that come with QuantFlow, lengths and groups that a plan
    takes from the model."""
    text = (
        "name: x\ncalibration: {}\nweights: {group_size: auto}\nstages: [gptq, pack: {format: awq},"
        " evaluate]\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.calibration is not None and (
        recipe.calibration.data,
        recipe.calibration.seqlen,
    ) == ("demo", AUTO)
    evaluate = recipe.stages[-1]
    assert isinstance(evaluate, Evaluate) and (
        evaluate.data,
        evaluate.length,
        recipe.weights.group_size,
    ) == ("demo-new", AUTO, AUTO)
    written = dump(recipe)
    assert (written["calibration"]["seqlen"], written["weights"]["group_size"]) == ("auto", "auto")
    assert read_recipe(written, KINDS) == recipe
    assert load_recipe(tmp_path / "recipe.yaml", ["calibration.seqlen=64"]).calibration.seqlen == 64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./SmolLM2-135M", "SmolLM2-135M_tiny"),
        ("Qwen/Qwen3-8B", "Qwen3-8B_tiny"),
        ("~/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd", "Qwen3-8B_tiny"),
        ("./m/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1_tiny"),
    ],
)
def test_an_artifact_is_named_after_its_recipe_and_the_model_that_was_given(
    model: str, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path, GOOD)
    assert (
        load_recipe(path, model=model).output
        == load_recipe(path, [f"model={model}"]).output
        == f"artifacts/{expected}"
    )
    assert load_recipe(path).output == "artifacts/tiny"  # the recipe's own model is in its name
    assert load_recipe(path, model=model, output="here").output == "here"
    path.write_text(f"output: there\n{GOOD}")
    assert load_recipe(path, model=model).output == "there"


@pytest.mark.parametrize(
    ("numbers", "stages", "expected"),
    [
        ("fp9", "[rtn, PACK]", ["`weights.numbers` is 'fp9'; expected one of integer, minimum"]),
        ("minimum", "[rtn, PACK]", []),
        (
            "minimum",
            "[calibrate, gptq, PACK]",
            ["`weights.numbers: minimum` with gptq; expected a stage rtn"],
        ),
        ("integer", "[nf4, PACK]", ["`weights.numbers: integer` with nf4; expected a stage rtn"]),
        (
            "minimum",
            "[calibrate, awq, rtn, PACK]",
            ["awq with `weights.numbers: minimum`; expected integer"],
        ),
        (
            "minimum, symmetric: false",
            "[rtn, PACK]",
            ["`weights.symmetric: false` with minimum; expected numbers with zero points"],
        ),
    ],
)
def test_numbers_and_the_stage_that_rounds_to_them(
    tmp_path: Path, numbers: str, stages: str, expected: list[str]
) -> None:
    text = (
        "name: x\nmodel: m\noutput: o\ncalibration: {data: demo}\n"
        f"weights: {{numbers: {numbers}}}\n"
        f"stages: {stages.replace('PACK', 'pack: {format: huggingface}')}\n"
    )
    path = write(tmp_path, text)
    if not expected:
        assert load_recipe(path).weights.numbers == "minimum"
        return
    assert [problem.where.rpartition(":")[2] for problem in problems_of(path)] == [
        "6" if "awq with" in expected[0] else "5"
    ]
    for problem, part in zip(problems_of(path), expected, strict=True):
        assert part in str(problem)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("bits: 8, numbers: bytes", []),
        ("numbers: bytes", ["`weights.bits` is 4 with bytes; expected 8"]),
        (
            "bits: 8, numbers: bytes, overrides: [{match: '*.up_proj', bits: 3}]",
            ["`weights.overrides[0].bits` is 3 with bytes; expected 8"],
        ),
    ],
)
def test_numbers_of_one_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, expected: list[str]
) -> None:
    class Bytes(MinimumTensor):
        kind, widths = "bytes", (8,)

    monkeypatch.setitem(NUMBERS, "bytes", Bytes)
    text = f"name: x\nmodel: m\noutput: o\nweights: {{{weights}}}\n"
    path = write(tmp_path, text + "stages: [rtn, pack: {format: huggingface}]\n")
    if not expected:
        assert load_recipe(path).weights.numbers == "bytes"
        return
    assert [str(problem).partition(":4: ")[2] for problem in problems_of(path)] == expected
