"""Releases: every file is accounted for, statements follow the specifications' rules, and what is
worse than before is found."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from quantflow.errors import UserError
from quantflow.pipeline.release import numbers
from quantflow.pipeline.release_comparison import compare_releases, read_release
from tests.helpers.runs import Bench, contents, invoke, make_bench

ROOT = Path(__file__).parents[2]
GPTQ: list[Any] = [
    "calibrate",
    "gptq",
    "kv_qparams",
    {"pack": {"format": "compressed-tensors"}},
    {"pack": {"format": "awq"}},
]
RTN: list[Any] = ["rtn", {"pack": {"format": "gptq_v2"}}]

# From the texts of the specifications: in-toto's spec/v1/statement.md, resource_descriptor.md and
# digest_set.md, SLSA v1.0's provenance. "Unrecognised fields must be ignored" is for readers: a
# writer has no business with others, so none are allowed here.
TYPE_URI = {"type": "string", "pattern": r"^[a-z][a-z0-9+.-]*:\S+$"}
DIGEST_SET = {
    "type": "object",
    "minProperties": 1,
    "properties": {
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "gitCommit": {"type": "string", "pattern": "^([0-9a-f]{40}|[0-9a-f]{64})$"},
    },
    "additionalProperties": False,
}
DESCRIPTOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "uri": TYPE_URI,
        "digest": DIGEST_SET,
        "annotations": {"type": "object"},
    },
    "anyOf": [{"required": ["uri"]}, {"required": ["digest"]}],
    "additionalProperties": False,
}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"}
STATEMENT = {
    "type": "object",
    "required": ["_type", "subject", "predicateType", "predicate"],
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {**DESCRIPTOR, "required": ["name", "digest"]},
        },
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": {
            "type": "object",
            "required": ["buildDefinition", "runDetails"],
            "properties": {
                "buildDefinition": {
                    "type": "object",
                    "required": ["buildType", "externalParameters"],
                    "properties": {
                        "buildType": TYPE_URI,
                        "externalParameters": {"type": "object", "minProperties": 1},
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": {"type": "array", "items": DESCRIPTOR},
                    },
                    "additionalProperties": False,
                },
                "runDetails": {
                    "type": "object",
                    "required": ["builder"],
                    "properties": {
                        "builder": {
                            "type": "object",
                            "required": ["id"],
                            "properties": {
                                "id": TYPE_URI,
                                "version": {
                                    "type": "object",
                                    "additionalProperties": {"type": "string"},
                                },
                                "builderDependencies": {"type": "array", "items": DESCRIPTOR},
                            },
                            "additionalProperties": False,
                        },
                        "metadata": {
                            "type": "object",
                            "properties": {
                                "invocationId": {"type": "string"},
                                "startedOn": TIME,
                                "finishedOn": TIME,
                            },
                            "additionalProperties": False,
                        },
                        "byproducts": {"type": "array", "items": DESCRIPTOR},
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def files(release: Path) -> set[str]:
    """Every file of a release, the hidden store left out."""
    return {
        str(p.relative_to(release))
        for p in release.rglob("*")
        if p.is_file() and not p.relative_to(release).parts[0].startswith(".")
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def recipes(bench: Bench) -> list[Path]:
    """Two, called `first` and `second`."""
    return [
        bench.recipe("first", name="first", stages=[*GPTQ, bench.evaluate()]),
        bench.recipe("second", name="second", stages=[*RTN, bench.evaluate()]),
    ]


@pytest.fixture(scope="module")
def made(bench: Bench, recipes: list[Path]) -> Path:
    """Their release."""
    output = bench.root / "made"
    result = invoke(
        "release",
        *recipes,
        "--output",
        output,
        "--builder-id",
        "https://ci.example.org/q",
        "--invocation-id",
        "run 7",
    )
    assert result.exit_code == 0, result.output
    assert "first" in result.stdout and "second" in result.stdout
    return output


def test_sums_cover_every_file(made: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == files(made) - {
        "SHA256SUMS"
    }


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_statement(made: Path, bench: Bench, recipes: list[Path], name: str) -> None:
    found = load(made / f"{name}.intoto.json")
    jsonschema.Draft202012Validator.check_schema(STATEMENT)
    jsonschema.validate(found, STATEMENT)
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in found["subject"]}
    assert set(subjects) == {file for file in files(made) if file.startswith(f"{name}/")} - {
        f"{name}/run.json"
    }
    assert all(sha256(made / file) == digest for file, digest in subjects.items())

    definition = found["predicate"]["buildDefinition"]
    recipe = yaml.safe_load((bench.root / f"{name}.yaml").read_text())
    stated = definition["externalParameters"]["recipe"]
    assert (stated["name"], stated["model"], stated["weights"]["bits"]) == (
        name,
        "model",
        recipe["weights"]["bits"],
    )
    assert [next(iter(stage)) for stage in stated["stages"]] == [
        s if isinstance(s, str) else next(iter(s)) for s in recipe["stages"]
    ]
    read = {d["name"]: d for d in definition["resolvedDependencies"]}
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert read[file]["digest"] == {"sha256": sha256(bench.model / file)}
    assert read["eval.txt"]["digest"] == {"sha256": sha256(bench.root / "eval.txt")}
    report = load(made / name / "report.json")
    assert read["eval.txt"]["annotations"] == {
        "role": "evaluation",
        "tokens_sha256": report["evaluation"]["tokens"],
    }
    assert ("calib.txt" in read) == (name == "first"), (
        "rounding to nearest reads no calibration text"
    )
    assert not re.search(re.escape(str(bench.root)), json.dumps(found)), "no place on this machine"

    details = found["predicate"]["runDetails"]
    assert (
        details["builder"]["id"] == "https://ci.example.org/q"
        and details["metadata"]["invocationId"] == "run 7"
    )
    assert (
        details["metadata"]["startedOn"]
        <= details["metadata"]["finishedOn"]
        == load(made / name / "run.json")["finished"]
    )


def test_the_index(made: Path) -> None:
    index = load(made / "release.json")
    assert list(index["artifacts"]) == ["first", "second"]
    entry, manifest = index["artifacts"]["first"], load(made / "first" / "quantflow.json")
    assert (
        entry["fingerprint"] == manifest["fingerprint"]
        and entry["status"] == "complete"
        and entry["quality"] == manifest["quality"]
    )
    final = manifest["quality"]["weights_and_kv"]
    assert (
        entry["numbers"]["kl_mean"] == final["kl_mean"]
        and entry["numbers"]["disagreement"] == 1 - final["top1"]
    )
    listed = [made / "first" / file for file in manifest["files"]]
    assert entry["numbers"]["bytes"] == sum(path.stat().st_size for path in listed) and entry[
        "files"
    ] == len(listed)
    for form, size in entry["format_bytes"].items():
        assert size == sum(
            p.stat().st_size for p in (made / "first" / form).rglob("*") if p.is_file()
        )


def test_another_release_differs_in_run_details_alone(
    made: Path, bench: Bench, recipes: list[Path]
) -> None:
    again = bench.root / "again"
    result = invoke(
        "release", *recipes, "--output", again, "--previous", made / "release.json", "--json"
    )
    assert result.exit_code == 0, result.output
    assert not list(again.glob("*.html")), "no folder, no reports"
    comparison = json.loads(result.stdout)["comparison"]
    assert comparison == load(again / "comparison.json")
    for row in comparison["artifacts"].values():
        assert (
            row["worse"] == []
            and row["note"] == ""
            and all(n["change"] == 0 for n in row["numbers"].values())
        )
    assert load(again / "release.json") == load(made / "release.json")
    for name in ("first", "second"):
        assert contents(again / name) == contents(made / name)
        one, other = load(made / f"{name}.intoto.json"), load(again / f"{name}.intoto.json")
        ids = [
            statement["predicate"].pop("runDetails")["metadata"]["invocationId"]
            for statement in (one, other)
        ]
        assert one == other and ids[0] == "run 7" != ids[1]


def test_reports_beside_the_previous_ones(
    made: Path, bench: Bench, recipes: list[Path], tmp_path: Path
) -> None:
    """Of the artifacts that are in both; a report that cannot be read costs its page alone."""
    output, previous = bench.root / "beside", tmp_path / "previous"
    for name in ("first", "second"):
        (previous / name).mkdir(parents=True)
        shutil.copy(made / name / "report.json", previous / name)
    shutil.copy(made / "release.json", previous)
    third = bench.recipe("third", name="third", stages=[*RTN, bench.evaluate()])
    (previous / "second" / "report.json").write_text('{"version": 0}')
    result = invoke("release", *recipes, third, "--output", output, "--previous", previous)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.glob("*.html")] == ["first.comparison.html"]
    assert "no second.comparison.html" in result.stderr and "third.comparison" not in result.stderr
    page = (output / "first.comparison.html").read_text()
    assert "first (previous)" in page and str(tmp_path) not in page and str(bench.root) not in page
    assert "  first.comparison.html\n" in (output / "SHA256SUMS").read_text()

    assert invoke("release", recipes[0], "--output", output).exit_code == 0
    assert not (output / "first.comparison.html").exists(), "it was of another release"


def test_what_is_left_of_other_releases_is_named_and_no_part(
    made: Path, bench: Bench, recipes: list[Path]
) -> None:
    output = bench.root / "fewer"
    shutil.copytree(made, output, symlinks=True)
    result = invoke("release", recipes[0], "--output", output)
    assert (
        result.exit_code == 0
        and "no part of this release: second, second.intoto.json" in " ".join(result.stdout.split())
    )
    assert "second" not in (output / "SHA256SUMS").read_text()

    (output / "first" / "notes.txt").write_text("somebody's")
    # `make test` runs this
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    make = ["make", "-C", str(ROOT), "assets", f"OUTPUT={output}"]
    done = subprocess.run(make, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assets = bench.root / "fewer.assets"
    assert {path.name for path in assets.iterdir()} == {
        "SHA256SUMS",
        "ARCHIVES.SHA256SUMS",
        "release.json",
        "release.md",
        "first.intoto.json",
        "first.manifest.json",
        "first.report.json",
        "first.report.html",
        "first.tar",
    }
    with tarfile.open(assets / "first.tar") as archive:
        archive.extractall(assets, filter="data")
    assert contents(assets / "first", skip=()) == contents(made / "first", skip=())
    subprocess.run(
        ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=assets, check=True
    )


def test_a_second_look_builds_nothing(made: Path, bench: Bench, recipes: list[Path]) -> None:
    before = {name: (made / name).stat().st_mtime_ns for name in files(made) if "/" in name}
    assert invoke("release", *recipes, "--output", made).exit_code == 0
    assert {name: (made / name).stat().st_mtime_ns for name in before} == before


def test_what_is_missing_is_built_and_nothing_else(made: Path, recipes: list[Path]) -> None:
    kept, lost = (made / "first" / "quantflow.json").stat().st_ino, contents(made / "second")
    shutil.rmtree(made / "second")
    (made / "SHA256SUMS").unlink()
    assert invoke("release", *recipes, "--output", made).exit_code == 0
    assert (made / "first" / "quantflow.json").stat().st_ino == kept and contents(
        made / "second"
    ) == lost
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=made).returncode == 0
    )


def test_a_missed_gate_keeps_nothing_from_being_run(bench: Bench, recipes: list[Path]) -> None:
    output = bench.root / "gated"
    strict = [
        bench.recipe(n, name=n, stages=[*RTN, bench.evaluate(gates={"kl_mean": 1e-9, "top1": 1})])
        for n in ("strict", "strict2")
    ]
    result = invoke("release", strict[0], recipes[1], strict[1], "--output", output)
    assert result.exit_code == 3
    for fragment in (
        "strict: kl_mean is",
        "strict: top1 is",
        "strict2: kl_mean is",
        "The artifact is kept",
    ):
        assert fragment in result.stderr
    status = {
        name: entry["status"] for name, entry in load(output / "release.json")["artifacts"].items()
    }
    assert status == {"strict": "failed", "second": "complete", "strict2": "failed"}
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=output).returncode
        == 0
    )
    assert "- strict2: kl_mean is" in (output / "release.md").read_text()


def test_worse_than_before_is_a_missed_gate(made: Path, bench: Bench, recipes: list[Path]) -> None:
    previous = bench.root / "previous.json"
    index = load(made / "release.json")
    index["artifacts"]["second"]["numbers"]["kl_mean"] *= 0.8
    index["artifacts"]["third"] = index["artifacts"]["first"]
    previous.write_text(json.dumps(index))
    arguments = ("release", *recipes, "--output", bench.root / "again", "--previous", previous)
    result = invoke(*arguments)
    assert (
        result.exit_code == 3
        and "second: KL mean is" in result.stderr
        and "first:" not in result.stderr
    )
    assert "third is no longer in the release" in result.stdout
    summary = (bench.root / "again" / "release.md").read_text()
    assert (
        "(+25.0%)" in summary
        and "- second: KL mean is" in summary
        and "- third: no longer" in summary
    )
    assert invoke(*arguments, "--tolerance", 0.3).exit_code == 0


def test_a_text_that_fails_lets_the_others_run(bench: Bench, recipes: list[Path]) -> None:
    """What only a run can find, here text seen in calibration, is reported at the end; there is no
    release."""
    output = bench.root / "overlap"
    seen = {"evaluate": {"data": str(bench.root / "calib.txt"), "windows": 4, "length": 32}}
    bad = bench.recipe("bad", name="bad", stages=[*GPTQ, seen])
    output.mkdir()
    (output / "SHA256SUMS").write_text("of a former release")
    result = invoke("release", bad, recipes[1], "--output", output)
    assert result.exit_code == 2 and "bad: evaluate: " in result.stderr
    assert (output / "second" / "quantflow.json").is_file()
    assert not (output / "SHA256SUMS").exists() and not (output / "release.json").exists()


def test_problems_of_all_recipes_at_once(bench: Bench, recipes: list[Path]) -> None:
    one = bench.recipe("one", name="one", stages=["gptk"])
    two = bench.recipe("two", name="two", model=str(bench.root / "nowhere"))
    result = invoke("release", one, two, recipes[0], recipes[0], "--output", bench.root / "none")
    assert result.exit_code == 2
    assert (
        "one.yaml:8: " in result.stderr
        and "two.yaml: " in result.stderr
        and "2 are called first" in result.stderr
    )
    assert not (bench.root / "none").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["SHA256SUMS"],
            "one is called SHA256SUMS; expected another name: that is the release's own SHA256SUMS",
        ),
        (["release.json"], "one is called release.json"),
        (["Release.MD"], "that is the release's own release.md"),
        (["comparison.json"], "one is called comparison.json"),
        (
            ["a", "a.intoto.json"],
            "one is called a.intoto.json; expected another name: that is what is written beside a",
        ),
        (
            ["a.comparison.html", "A"],
            (
                "one is called a.comparison.html; expected another name: that is what is written"
                " beside A"
            ),
        ),
        (["a", "b", "A"], "a and A differ only in case"),
    ],
)
def test_names_that_a_folder_cannot_hold_are_refused(
    bench: Bench, names: list[str], said: str
) -> None:
    given = [bench.recipe(f"clash{i}", name=name, stages=RTN) for i, name in enumerate(names)]
    result = invoke("release", *given, "--output", bench.root / "clash")
    assert (
        result.exit_code == 2
        and said in " ".join(result.stderr.split())
        and "1 problem\n" in result.stderr
    ), result.stderr
    assert not (bench.root / "clash").exists()


def test_what_is_refused(made: Path, bench: Bench, recipes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"artifacts": {"a": {"numbers": {"kl_mean": "low"}}}}')
    (tmp_path / "odder.json").write_text('{"artifacts": [1]}')
    for arguments, fragment in (
        (("--previous", tmp_path / "none"), "no such file"),
        (("--previous", tmp_path / "odd.json"), "expected a number"),
        (("--previous", tmp_path / "odder.json"), "expected the release.json"),
        (("--previous", made), "would be lost"),
        (("--builder-id", "me"), "a URI"),
        (("--tolerance", -1), "--tolerance"),
    ):
        result = invoke("release", *recipes, "--output", made, *arguments)
        assert result.exit_code == 2 and fragment in " ".join(result.stderr.split()), result.output
        assert (made / "SHA256SUMS").is_file(), "nothing was touched"
    shutil.copytree(made / "second", tmp_path / "artifact")
    result = invoke("release", *recipes, "--output", tmp_path / "artifact")
    assert result.exit_code == 2 and "a folder for several" in result.stderr


# Numbers beside numbers


def entry(measured_on: str | None = "x", **changed: float) -> dict[str, Any]:
    numbers = {
        "perplexity": 10.0,
        "perplexity_excess": 0.02,
        "kl_mean": 0.01,
        "kl_p99": 0.1,
        "disagreement": 0.05,
    }
    return {"measured_on": measured_on, "numbers": {**numbers, **changed}}


def compared(
    former: dict[str, Any] | None, now: dict[str, Any], tolerance: float = 0.1
) -> dict[str, Any]:
    before = {"artifacts": {"a": former} if former else {}}
    return compare_releases(before, {"quantflow": "1", "artifacts": {"a": now}}, tolerance)[
        "artifacts"
    ]["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('"kl_mean": NaN', "a kl_mean: NaN; expected a number"),
        ('"kl_mean": Infinity', "a kl_mean: Infinity"),
        ('"kl_mean": -0.5', "a kl_mean: -0.5; expected a number from 0 on"),
        ('"bytes": -1', "a bytes: -1; expected"),
        ('"kl_p99": true', "a kl_p99: true; expected a number"),
        ('"perplexity": 1' + "0" * 400, "a perplexity: 1"),
        ('"odd \\ud800": 1', 'a numbers: "odd \\ud800"; expected text that UTF-8 can hold'),
        (None, "numbers without kl_mean, bytes; expected those of"),
    ],
)
def test_a_former_release_that_no_release_wrote_is_refused(
    tmp_path: Path, change: str | None, said: str
) -> None:
    own = {**entry(), "numbers": {**entry()["numbers"], "bytes": 10}}
    path = tmp_path / "release.json"
    path.write_text(json.dumps({"quantflow": "1", "artifacts": {"a": own}}))
    assert read_release(tmp_path)["artifacts"] == {"a": own}
    if change:
        # the last of two counts
        path.write_text(path.read_text().replace('"bytes": 10', f'"bytes": 10, {change}'))
    else:
        del own["numbers"]["kl_mean"], own["numbers"]["bytes"]
        path.write_text(json.dumps({"artifacts": {"a": own}}))
    with pytest.raises(UserError) as caught:
        read_release(path)
    [problem] = caught.value.problems
    assert said in str(problem) and problem.where.startswith(str(path)) and str(problem).encode()


def test_a_former_release_without_quality_is_none_that_is_wrong(tmp_path: Path) -> None:
    """And an excess may be below 0, a divergence by rounding."""
    path = tmp_path / "release.json"
    artifacts = {
        "a": {"measured_on": None, "numbers": {"bytes": 5}},
        "b": entry(bytes=5, perplexity_excess=-0.1, kl_mean=-1e-9),
    }
    path.write_text(json.dumps({"artifacts": artifacts}))
    assert read_release(path)["artifacts"] == artifacts


@pytest.mark.parametrize(
    ("numbers", "worse"),
    [
        ({}, []),
        ({"kl_mean": 0.01100}, []),  # a tenth more
        ({"kl_mean": 0.01102}, ["KL mean"]),  # and more than the floor of 1e-5 beyond it
        ({"kl_mean": 0.001, "kl_p99": 0.2}, ["KL p99"]),
        ({"disagreement": 0.0555}, []),
        ({"disagreement": 0.06}, ["other top-1"]),
        ({"perplexity_excess": 0.0229}, []),  # a tenth, and the floor of 1e-3
        ({"perplexity_excess": 0.0231, "kl_p99": 0.12}, ["excess, nats", "KL p99"]),
        ({"perplexity_excess": -0.02}, []),
        ({"perplexity": 11.1}, []),  # shown
        ({"kl_mean": math.nan}, ["KL mean"]),
        ({"bytes": 1e9}, []),
    ],
)
def test_what_counts_as_worse(numbers: dict[str, float], worse: list[str]) -> None:
    found = compared(entry(bytes=10), entry(**{"bytes": 10, **numbers}))
    assert [text.partition(" is ")[0] for text in found["worse"]] == worse


def test_perplexity_is_judged_against_the_originals() -> None:
    """20 to 20.1 is an excess of log(1.005) = 0.00499 nats. A tenth more, and the floor, is 20.13;
    a tenth of perplexity would be 22."""

    def at(perplexity: float) -> dict[str, Any]:
        figures = {
            "perplexity": perplexity,
            "reference_perplexity": 20.0,
            "kl_mean": 0.01,
            "kl_p99": 0.1,
            "top1": 0.9,
        }
        return {"measured_on": "x", "numbers": numbers({"weights": figures})}

    assert at(20.1)["numbers"]["perplexity_excess"] == pytest.approx(0.0049875, abs=1e-7)
    assert compared(at(20.1), at(20.129))["worse"] == []
    (text,) = compared(at(20.1), at(20.135))["worse"]
    assert text.startswith("excess, nats is 0.0067, in the previous release 0.0050")
    # Below the original by chance: a tenth of that is no room upwards, the floor is.
    assert (
        compared(at(19.99), at(19.999))["worse"] == []
        and compared(at(19.99), at(20.03))["worse"] != []
    )


def test_changes_are_relative() -> None:
    found = compared(entry(), entry(kl_mean=0.0125))["numbers"]["kl_mean"]
    assert (
        found["previous"] == 0.01
        and found["now"] == 0.0125
        and found["change"] == pytest.approx(0.25)
    )
    for nothing in (0.0, -0.001):
        found = compared(entry(perplexity_excess=nothing), entry())["numbers"]["perplexity_excess"]
        assert found["change"] is None, "nothing is a fraction of 0, or of less"


@pytest.mark.parametrize(
    ("former", "now", "note"),
    [
        (None, entry(), "new"),
        (entry("x"), entry("y", kl_mean=1.0), "not judged: measured against another model"),
        (entry("x"), entry(None), "not judged: its quality was not measured"),
    ],
)
def test_what_cannot_be_compared_is_said(
    former: dict[str, Any] | None, now: dict[str, Any], note: str
) -> None:
    found = compared(former, now)
    assert found["note"].startswith(note) and found["worse"] == []
