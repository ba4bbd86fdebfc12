"""Whether the working tree writes the same bytes as an earlier commit.

    python benchmarks/same_bytes.py                    # everything, against BASE
    python benchmarks/same_bytes.py HEAD~3 --quick     # three families, in less than a minute
    python benchmarks/same_bytes.py --only 'qwen*'     # the cases whose name matches
    python benchmarks/same_bytes.py --ignore 'store/*' # where the store's own files may change on
    purpose

The commit is checked out beside the working tree (`git worktree`), and both run the same matrix on
this machine at the same time, each in a process of its own with one thread and stores of its own:
every family of the tests' zoo through every combination of layer stages, every format,
tensor-parallel ranks, requantisation and exports; the demo; babyllama-1m where ../shared has it.
Then every file that was written is compared byte for byte: safetensors, GGUF, workspaces, configs,
tokenizers, and the layers in the stores. Of reports and manifests the identities are left out, and
of a case that is refused the exit code and the message are compared. Prints what differs, and exits
with 1.

Nothing here imports the package: the command line is all that both trees must have in common.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# before the package was opened up: what it wrote is what everything since must write
BASE = "41bbeb2ba6fa"
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
QUICK = ("llama3", "mixtral_fused", "opt")
MIXTURES = ("mixtral", "mixtral_fused", "qwen3_moe", "qwen3_moe_fused")
GGUFS = ("llama3", "internlm", "internlm2", "qwen", "qwen3", "wide")  # whose formats those are
WORKSPACES = ("internlm", "internlm2", "llama_bias", "qwen", "wide")
FORMATS = (
    "compressed-tensors", "awq", "gptq", "gptq_v2", "bitsandbytes", "turbomind", "gguf",
    "huggingface",
)  # fmt: skip

Case = dict[str, Any]  # name, and either a recipe or the arguments of `export`

# Models and texts, written once by the working tree's test helpers: both sides read them.
MODELS = """
import sys
from pathlib import Path
import torch
from tests.helpers import specimens, tiny, zoo, zoo_extended

root = Path(sys.argv[1])
# whole blocks of 32 and 64, halved into ranks too
for module in (specimens, zoo, zoo_extended):
    module.INNER = 128
zoo.EXPERT_INNER, zoo.QWEN3_HEAD, zoo.INTERNLM3_HEAD, zoo_extended.GEMMA_HEAD = 64, 32, 32, 32
dtypes = dict.fromkeys(("internlm", "qwen", "llama_bias", "opt"), torch.float16)
dtypes["qwen3_moe"] = torch.float32
for name in zoo.ZOO:
    specimen = zoo.specimen(name, dtypes.get(name, torch.bfloat16))
    zoo.write(root / name, specimen, shards=2 if name == "qwen2" else 1)
wide = dict(hidden_size=256, intermediate_size=512, num_key_value_heads=4)
tiny.write_llama(root / "wide", dtype=torch.float16, **wide)
tiny.write_text(root / "calib.txt", 0, 128)
tiny.write_text(root / "eval.txt", 128, 256)
print(*zoo.ZOO, "wide")
"""


def zoo_cases(model: str, models: Path) -> Iterator[Case]:
    """One small model through all combinations of stages, and from what they wrote into every
    format."""
    mixture = model in MIXTURES
    experts = {"ignore": ["lm_head", "*.experts.*"]} if mixture else {}
    workspace, gguf = (
        ["turbomind"] if model in WORKSPACES else [],
        ["gguf"] if model in GGUFS else [],
    )
    formats = [
        form for form in FORMATS if form not in {"gguf", "turbomind"}.difference(workspace, gguf)
    ]

    def recipe(name: str, stages: list[Any], packs: list[Any], tp: int = 1, **weights: Any) -> Case:
        stages = [
            *stages,
            *({"pack": {"format": pack} if isinstance(pack, str) else pack} for pack in packs),
        ]
        content = {
            "name": "same", "model": str(models / model),
            **({"weights": weights} if weights else {}),
            "calibration": {"data": str(models / "calib.txt"), "samples": 12, "seqlen": 20},
            "stages": [*stages, {"shard": {"tp": tp}}] if tp > 1 else stages,
        }  # fmt: skip
        return {"name": f"{model}/{name}", "recipe": content}

    def again(form: str) -> dict[str, Any]:
        return {"format": form, "requantize": True}

    grid: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": mixture}
    awq = {"awq": {"grid": 4}}
    yield recipe(
        "awq_gptq",
        ["calibrate", awq, "gptq", "kv_qparams"],
        [{"format": "compressed-tensors", "kv_scales": "fp8"}, "awq", "gptq_v2", "huggingface"],
        2,
        **grid,
    )
    dynamic = {"gptq": {"act_order": "dynamic", "damp": 0.02, "refine": 0}}
    yield recipe(
        "gptq_dynamic",
        [dynamic],
        ["gptq", "gptq_v2", "huggingface"],
        **{**grid, "symmetric": False},
    )
    plain = {"gptq": {"act_order": "none", "range_search": False, "refine": 0}}
    yield recipe(
        "gptq_channel",
        [plain],
        ["compressed-tensors", "gptq_v2"],
        bits=3,
        group_size=-1,
        symmetric=True,
    )
    per_head = {"kv_qparams": {"granularity": "head", "symmetric": True}}
    yield recipe(
        "gptq_symmetric",
        ["calibrate", "gptq", per_head],
        [*gguf, "gptq", "awq"],
        **{**grid, "symmetric": True},
    )
    yield recipe(
        "rtn",
        ["rtn"],
        ["compressed-tensors", "gptq", *gguf, "huggingface"],
        bits=8,
        group_size=32,
        symmetric=True,
    )
    mixed = {
        "overrides": [
            {"match": "*.k_proj", "bits": 8, "group_size": -1},
            {"match": "*.1.self_attn.v_proj", "ignore": True},
        ]
    }
    searched = {"rtn": {"range_search": True}}
    yield recipe(
        "rtn_search",
        [searched],
        ["compressed-tensors", "gptq_v2", *map(again, gguf), "huggingface"],
        **grid,
        **mixed,
    )
    asymmetric = {**grid, "symmetric": False}
    yield recipe(
        "awq_rtn",
        ["calibrate", awq, "rtn", "kv_qparams"],
        ["awq", "gptq_v2", *map(again, gguf + workspace)],
        **asymmetric,
    )
    yield recipe(
        "nf4", ["nf4"], ["bitsandbytes", "huggingface", *map(again, gguf), again("gptq")], **experts
    )
    double = ["calibrate", {"nf4": {"double_quant": True}}, "kv_qparams"]
    yield recipe("nf4_double", double, ["bitsandbytes", "huggingface"], **experts)
    yield recipe(
        "measured", ["calibrate", {"kv_qparams": {"granularity": "channel"}}], ["huggingface"]
    )

    def export(name: str, source: str, form: str, *arguments: str) -> Case:
        return {
            "name": f"{model}/{name}_{form}",
            "export": f"{model}/{source}",
            "arguments": ["--format", form, *arguments],
        }

    for form in formats:
        yield export("exact", "awq_gptq/compressed-tensors", form)
        yield export("requantized", "rtn_search/compressed-tensors", form, "--requantize")
        yield export("from_index", "gptq_dynamic/gptq", form, "--requantize")
        # which do with these what the forms before them do
        if form not in ("gptq_v2", "huggingface"):
            yield export("from_nf4", "nf4_double/bitsandbytes", form, "--requantize")
            if gguf:
                yield export("from_gguf", "gptq_symmetric/gguf", form)
                yield export("from_minimums", "awq_rtn/gguf", form, "--requantize")
    for form in ("compressed-tensors", "gptq", *(workspace if model == "wide" else [])):
        yield export("ranks", "awq_gptq/awq", form, "--tp", "2", "--requantize")
    yield {
        "name": f"{model}/plain_awq",
        "model": str(models / model),
        "arguments": ["--format", "awq", "--requantize", "--tp", "2"],
    }
    yield export(
        "bfloat16", "rtn/compressed-tensors", "huggingface", "--dtype", "bfloat16", "--requantize"
    )


def larger_cases(shared: Path | None) -> Iterator[Case]:
    """What people run: the demo of each tree, and a real small model."""
    yield {"name": "demo/all_stages", "run": ["recipes/demo_w4_kv8.yaml"]}
    yield {"name": "demo/gguf", "run": ["recipes/demo_gguf.yaml"]}
    if shared is not None:
        calibration = {
            "data": str(shared / "text" / "tinystories.txt"),
            "samples": 32,
            "seqlen": 256,
        }
        for name, stages in {
            "gptq": [
                "calibrate",
                "awq",
                "gptq",
                "kv_qparams",
                {"pack": {"format": "compressed-tensors"}},
                {"shard": {"tp": 2}},
            ],
            "nf4": ["nf4", {"pack": {"format": "bitsandbytes"}}],
        }.items():
            weights = (
                {"ignore": ["lm_head", "*.down_proj"]} if name == "nf4" else {"group_size": "auto"}
            )
            content = {
                "name": "same",
                "model": str(shared / "models" / "babyllama-1m"),
                "weights": weights,
                "calibration": calibration,
            }
            yield {"name": f"babyllama-1m/{name}", "recipe": {**content, "stages": stages}}


# One side


def work(cases: list[Case], out: Path) -> None:
    """Runs the cases with the tree that is on the path. Each leaves a folder `out/<name>`, its
    store in `store`, and `outcome.txt`."""
    from quantflow.cli.main import app

    for case in cases:
        folder = out / case["name"]
        folder.mkdir(parents=True)
        os.environ["QUANTFLOW_STORE"] = str(folder / "store")
        if "recipe" in case:
            (folder / "recipe.yaml").write_text(json.dumps(case["recipe"]), encoding="utf-8")
            arguments = ["run", str(folder / "recipe.yaml"), "--output", str(folder / "artifact")]
        elif "run" in case:
            arguments = ["run", *case["run"], "--output", str(folder / "artifact")]
        else:
            source = case.get("model") or str(_place(out / case["export"]))
            if not Path(source).is_dir():
                raise SystemExit(
                    f"{case['name']}: {source} is not there, which is a mistake in the cases"
                )
            arguments = ["export", source, *case["arguments"], "--output", str(folder / "artifact")]
        told, code = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            try:
                app(arguments, standalone_mode=False)
            except SystemExit as end:
                code = int(end.code or 0)
            except (
                Exception
            ) as error:  # typer's Exit, and what nobody should see: both are outcomes
                code = int(getattr(error, "exit_code", 70))
                told.write(
                    "" if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"
                )
        text = told.getvalue().replace(str(out), "OUT").replace(os.getcwd(), "TREE")
        (folder / "outcome.txt").write_text(f"{code}\n{text if code else ''}", encoding="utf-8")


def _place(source: Path) -> Path:
    """Where a case's checkpoint of one format lies: in a folder of the format, or in the artifact
    itself where it is the only one."""
    several = source.parent / "artifact" / source.name
    return several if several.is_dir() else source.parent / "artifact"


# What they left


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file below a case's folder what must be the same, by its name. A store's folders are
    called by the identity, which may change: their files are called by their names and numbered,
    those of the same name in the order of their bytes."""
    result: dict[str, bytes] = {}
    stored: dict[str, list[bytes]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] == "store":
            if path.suffix == ".safetensors":
                stored.setdefault(path.name, []).append(path.read_bytes())
        elif name.name in ("report.json", "quantflow.json"):
            kept = json.loads(path.read_bytes())
            for key in ("fingerprint", "files", "artifact"):
                kept.pop(key, None)
            kept.get("source", {}).pop("artifact", None)
            result[str(name)] = json.dumps(kept, indent=1).encode()
        elif name.name not in ("run.json", "report.html", "recipe.yaml"):
            result[str(name)] = path.read_bytes()
    for name, files in stored.items():
        result |= {f"store/{name} #{i}": data for i, data in enumerate(sorted(files))}
    return result


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[tuple[str, str]]:
    """(file, how it differs), sorted by name."""
    result = []
    for name in sorted(one.keys() | other.keys()):
        if name not in other:
            result.append((name, "is missing now"))
        elif name not in one:
            result.append((name, "is new"))
        elif (before := one[name]) != (now := other[name]):
            first = next(
                (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
                min(len(before), len(now)),
            )
            changed = sum(a != b for a, b in zip(before, now, strict=False)) + abs(
                len(before) - len(now)
            )
            sizes = (
                f"{len(before)} bytes"
                if len(before) == len(now)
                else f"{len(before)} and {len(now)} bytes"
            )
            result.append((name, f"{changed} of {sizes} differ, from byte {first} on"))
    return result


# Both


@contextlib.contextmanager
def checkout(commit: str, place: Path) -> Iterator[str]:
    """The commit in a worktree at `place`, for as long as the block lasts; yields its full name."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"git {arguments[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    full = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    git("worktree", "add", "--detach", str(place), full)
    try:
        yield full
    finally:
        git("worktree", "remove", "--force", str(place))


def _started(tree: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Python in a tree, with its packages, one thread, wide messages, and no way to the network."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "COLUMNS": "10000",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    return subprocess.Popen([sys.executable, "-P", *arguments], cwd=tree, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", default=BASE)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose name matches")
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="files that may change on purpose",
    )
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="where to leave what both have written"
    )
    parser.add_argument("--work", nargs=2, metavar=("CASES", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(Path(args.work[0]).read_text(encoding="utf-8")), Path(args.work[1]))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        root = (args.keep or Path(scratch)).absolute()
        models, listed = root / "models", root / "cases.json"
        models.mkdir(parents=True)
        with checkout(args.commit, Path(scratch) / "tree") as commit:
            if _started(ROOT, ["-c", MODELS, str(models)]).wait():
                raise SystemExit("the models could not be written")
            names = sorted(path.name for path in models.iterdir() if path.is_dir())
            cases = [
                case
                for name in names
                if not args.quick or name in QUICK
                for case in zoo_cases(name, models)
            ]
            cases += (
                []
                if args.quick
                else larger_cases(SHARED if (SHARED / "models" / "babyllama-1m").is_dir() else None)
            )
            chosen = [case for case in cases if fnmatch(case["name"], args.only)]
            needed = {
                "/".join(case["export"].split("/")[:2]) for case in chosen if "export" in case
            }
            cases = [case for case in cases if case in chosen or case["name"] in needed]
            listed.write_text(json.dumps(cases), encoding="utf-8")
            sides = {"before": Path(scratch) / "tree", "now": ROOT}
            script = str(Path(__file__).resolve())
            running = [
                _started(tree, [script, "--work", str(listed), str(root / side)])
                for side, tree in sides.items()
            ]
            if any([process.wait() for process in running]):
                raise SystemExit("a side has failed: see above")
        raise SystemExit(_report(commit, cases, root, args.ignore, began))


def _report(commit: str, cases: list[Case], root: Path, ignored: list[str], began: float) -> int:
    kinds: Counter[str] = Counter()
    refused, wrong = 0, 0
    for case in cases:
        before, now = (contents(root / side / case["name"]) for side in ("before", "now"))
        kinds.update(Path(name.partition(" ")[0]).suffix or name for name in before)
        refused += before["outcome.txt"][:1] != b"0"
        if "arguments" not in case and before["outcome.txt"] == now["outcome.txt"] != b"0\n":
            wrong += 1
            print(f"{case['name']:<44}refused by both, which is a mistake in the cases")
        for name, how in differences(before, now):
            if not any(fnmatch(name, pattern) for pattern in ignored):
                wrong += 1
                print(f"{case['name']:<44}{name:<60}{how}")
    files = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(
        f"{len(cases)} cases ({refused} refused, alike unless listed), {kinds.total()} files:"
        f" {files}"
    )
    print(
        f"{f'{wrong} differences from' if wrong else 'All the same as'} {commit[:12]}, in"
        f" {time.monotonic() - began:.0f} s."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
