"""Builds the native library; everything else about the package is in pyproject.toml.

The library links against the LibTorch stable ABI only and holds no Python module, so that one binary
serves every torch >= 2.10 and every Python: it is loaded with `torch.ops.load_library`.

Environment:
    PORTLLM_SKIP_CPP_BUILD=1   build a pure package
    PORTLLM_REQUIRE_NATIVE=1   fail where the native library would be left out
    PORTLLM_CXXFLAGS="..."     more flags for the compiler and the linker, after those of this file

Without torch at build time (an isolated build), without a compiler, or if the compiler fails, the package
is built pure, says so in one line, and works with the slower backends.
"""

import os
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_MIN = (2, 10)
LIBRARY = "libportllm.so"  # portllm/_native.py looks for this name


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def more_flags() -> list[str]:
    return shlex.split(os.environ.get("PORTLLM_CXXFLAGS", ""))


def torch_root() -> Path | str:
    """The directory of a usable torch, or why there is none."""
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build (use --no-build-isolation)"
    if torch.__version__ < TORCH_MIN:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_MIN))}"
    return Path(torch.__file__).parent


class BuildNative(build_ext):
    """Builds the library or, unless it is required, explains in one line why there will be none."""

    built = False

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library: no Python version in its name.
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        why = self.attempt(ext)
        if why is None:
            self.built = True
        else:
            self.leave_out(ext, why)

    def attempt(self, ext: Extension) -> str | None:
        """Build; return why it could not be done, or None."""
        if flag("PORTLLM_SKIP_CPP_BUILD"):
            return "PORTLLM_SKIP_CPP_BUILD is set"
        if sys.platform == "win32":
            return "only gcc and clang are supported"
        root = torch_root()
        if isinstance(root, str):
            return root
        ext.include_dirs = ["csrc", str(root / "include")]
        ext.library_dirs = [str(root / "lib")]
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever goes wrong in the compiler, the package must still install
            return f"{type(error).__name__}: {error}"
        return None

    def leave_out(self, ext: Extension, why: str) -> None:
        if flag("PORTLLM_REQUIRE_NATIVE"):
            raise RuntimeError(f"portllm: native library not built: {why}")
        print(f"portllm: native library not built: {why}", file=sys.stderr, flush=True)
        # A library left by an earlier build must not be taken for this one's.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            Path("portllm", LIBRARY).unlink(missing_ok=True)
        ext.optional = True  # tells setuptools not to look for the file


class Wheel(bdist_wheel):
    """Tags the wheel by platform only, or by nothing where it is pure."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if self.get_finalized_command("build_ext").built else "any"


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc", folder).glob(pattern))


setup(
    ext_modules=[
        Extension(
            "portllm.libportllm",
            sources=sources("cpu", "*.cpp"),
            depends=sources("cpu", "*.h"),
            language="c++",
            libraries=["torch_cpu"],  # by name only: torch has loaded it before us
            define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}{0:012x}")],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
                "-ffp-contract=off",  # which products are fused is part of the result's definition
                "-Wno-maybe-uninitialized",  # false alarms from gcc 12's own intrinsics
                *more_flags(),
            ],
            extra_link_args=more_flags(),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
