"""sd-unlearn doctor: what it finds, what it must not show, and that a broken installation is reported, not raised."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch

from sd_unlearn import cli
from sd_unlearn.doctor import doctor, machine, packages, smoke
from sd_unlearn.doctor.check import Check

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that prints and then fails to import, with the path of a library in its message."""
    (tmp_path / "sd_unlearn_broken.py").write_text(
        "print('noise')\nraise OSError('/home/jane/env/lib/libx.so.1: cannot open: jane secrets')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "sd_unlearn_broken"


def names(requirements: list[str]) -> set[str]:
    return {r.split(">")[0].split("[")[0].strip().lower() for r in requirements}


def test_every_dependency_and_every_extra_is_checked() -> None:
    assert set(packages.NEEDED) == names(PROJECT["dependencies"])
    assert set(packages.EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_the_result_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Everything needed works.")
    assert f"torch{' ' * 2}" in out
    assert "trained and generated images on " in out
    assert cli.main(["doctor", "--json", "--skip_smoke_run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    torch_line = {"section": "Packages", "name": "torch", "status": "ok", "detail": version("torch"), "needed": True}
    assert checks["torch"] == torch_line
    assert checks["hub"]["detail"].startswith("offline mode")  # HF_HUB_OFFLINE in tests
    assert "smoke run" not in checks
    assert set(packages.EXTRAS) <= set(checks)


def test_a_broken_package_is_reported_and_the_code_is_1(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(packages.NEEDED, "torch", broken)
    monkeypatch.setitem(packages.NEEDED, "peft", "sd_unlearn_absent")
    monkeypatch.setattr(doctor, "extras", lambda: [])
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "noise" not in out + err
    assert "OSError: .../libx.so.1: cannot open" in out
    assert "Broken: torch, peft." in out
    assert "smoke run" not in out  # it could only fail, too
    assert err.startswith("Error: ")
    assert "torch, peft" in err


def test_a_broken_extra_is_not_needed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "EXTRAS", {"x": ((broken,), "x-rays"), "y": (("sd_unlearn_absent",), "why")})
    broken_extra, absent = packages.extras()
    assert (broken_extra.status, absent.status) == ("broken", "missing")
    assert "x-rays" in broken_extra.detail
    assert "pip install -e '.[y]'" in absent.detail
    assert doctor.failures([broken_extra, absent]) == []


def test_a_version_that_does_not_suit_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NEEDED", {"numpy": "numpy"})
    monkeypatch.setattr(packages, "requires", lambda _: ["numpy<1,>=0.5", "torch; extra == 'x'"])
    (check,) = packages.packages()
    assert check.status == "broken"
    assert "sd-unlearn needs <1,>=0.5" in check.detail


def test_a_failing_smoke_run_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> str:
        print(f"training in {folder}")
        raise RuntimeError(f"cannot read {folder}/run/x.json")

    monkeypatch.setattr(smoke, "smoke_run", fail)
    check = doctor.anonymous(smoke.smoke_check())
    assert (check.status, check.needed) == ("broken", True)
    assert check.detail == "RuntimeError: cannot read .../x.json"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane/x.so: undefined symbol", ".../x.so: undefined symbol"),
        ("cannot read '/tmp/a b/c'", "cannot read '.../c'"),
        (r"DLL in C:\Users\jane\env\x.dll failed", "DLL in .../x.dll failed"),
        ("12.0 GB, 3/4 used, and/or", "12.0 GB, 3/4 used, and/or"),
        ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
    ],
)
def test_paths_are_not_shown(text: str, shown: str) -> None:
    assert doctor.anonymous(Check("s", "n", "info", text)).detail == shown


def test_names_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jane.doe")
    monkeypatch.setattr(socket, "gethostname", lambda: "deep-thought")
    shown = doctor.anonymous(Check("s", "n", "info", "of jane.doe on deep-thought, ok")).detail
    assert shown == "of ... on ..., ok"


def test_gpus_are_listed_with_their_memory() -> None:
    class Properties:
        name = "Test GPU"

    cuda = ModuleType("cuda")
    cuda.device_count = lambda: 1  # type: ignore[attr-defined]
    cuda.get_device_properties = lambda _: Properties  # type: ignore[attr-defined]
    cuda.mem_get_info = lambda _: (6e9, 8e9)  # type: ignore[attr-defined]
    cuda.is_bf16_supported = lambda: True  # type: ignore[attr-defined]
    fake = ModuleType("torch")
    fake.cuda, fake.version, fake.backends = cuda, torch.version, torch.backends  # type: ignore[attr-defined]
    (check,) = machine.gpus(fake)
    assert check.detail.startswith("Test GPU, 8.0 GB, 6.0 GB free, ")


def test_the_hub_is_asked_with_a_short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def refuse(url: str, timeout: float) -> None:
        asked.append(timeout)
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = next(iter(machine.hub()))
    assert asked == [machine.HUB_TIMEOUT]
    assert (hub.status, hub.needed) == ("broken", False)
    assert "not reachable (OSError)" in hub.detail


def test_the_disk_of_the_model_cache_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    asked: list[Path] = []
    usage = shutil.disk_usage
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: [asked.append(Path(place)), usage(place)][1])
    assert [check.name for check in machine.disk()] == ["working folder", "model cache"]
    assert asked == [Path(), tmp_path]
