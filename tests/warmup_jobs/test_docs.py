"""The examples of docs/warmup.md are what they say they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import accel
from accel.errors import RecipeError
from accel.warmup_jobs.jobs import expand, read_jobs

DOCS = Path(accel.__file__).parents[1] / "docs" / "warmup.md"
JOBS, KUBERNETES = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_jobs_example_is_planned(bundles: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = JOBS.replace("/bundles/minilm", "bert").replace("/bundles/smollm2", "llama")
    for long, short in {"8192": "160", "2048": "128", "256": "64", "512": "128"}.items():  # the tiny model's positions
        text = text.replace(long, short)
    (bundles / "jobs.yaml").write_text(text.replace("s3://models/engines", "engines"))
    report = accel.warmup(bundles / "jobs.yaml", dry_run=True)
    assert [line.status for line in report.engines] == ["miss"] * 12, "three, six, one and two, as the text says"
    assert report.ok and report.store == str(bundles / "engines") and (bundles / "warmup.json").exists()
    assert [line.capacity for line in report.engines] == [None] * 3 + [128] * 3 + [160] * 3 + [128] * 3
    assert [line.target for line in report.engines[-2:]] == ["cuda", "ort-cuda"]
    assert {line.status for line in report.measured} <= {"miss", "skipped"} and len(report.measured) == 2


def test_the_jobs_example_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(JOBS.replace("max_batch: 64", "max_bach: 64"))
    with pytest.raises(RecipeError, match=r"'max_bach'.*'max_batch'"):
        expand(*read_jobs(path))


def test_the_kubernetes_example() -> None:
    job: dict[str, Any] = yaml.safe_load(KUBERNETES)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = accel_options(container["command"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert str(options.jobs.parent) == mounts["jobs"] and not options.dry_run
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["ACCEL_STORE_KEY"].startswith(mounts["keys"]) and variables["ACCEL_CACHE"] == mounts["cache"]
    wanted = expand(read_jobs(yaml.safe_load(JOBS))[0], Path("/jobs"))
    assert all(one.bundle.startswith(mounts["bundles"] + "/") for one in wanted)
    assert pod["restartPolicy"] in ("Never", "OnFailure")


def accel_options(command: list[str]) -> Any:
    from accel.cli import build_parser

    program, *arguments = command
    assert program == "accel"
    return build_parser().parse_args(arguments)
