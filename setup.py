"""Builds the native libraries; everything else about the package is in pyproject.toml.

They link against the LibTorch stable ABI only and hold no Python module, so that one binary serves every
torch >= 2.10 and every Python: it is loaded with `torch.ops.load_library`. The one for CUDA is built wherever
nvcc is found; that needs no GPU, and no torch with CUDA.

Environment:
    PORTLLM_SKIP_CPP_BUILD=1   build a pure package
    PORTLLM_SKIP_CUDA_BUILD=1  leave the library for CUDA out
    PORTLLM_REQUIRE_NATIVE=1   fail where the library for the CPU would be left out
    PORTLLM_REQUIRE_CUDA=1     fail where the library for CUDA would be left out
    PORTLLM_CXXFLAGS="..."     more flags for the C++ compiler and the linker, after those of this file
    PORTLLM_NVCCFLAGS="..."    more flags for nvcc, such as -lineinfo
    TORCH_CUDA_ARCH_LIST       GPUs to build for, as torch has it: "8.0;9.0+PTX"
    CUDA_HOME                  where CUDA is, if nvcc is not on the PATH

Without torch at build time (an isolated build), without a compiler, or if the compiler fails, a library is
left out; one line says so, and the slower backends work.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

TORCH_MIN = (2, 10)
CPU, CUDA = "portllm.libportllm", "portllm.libportllm_cuda"  # portllm/_native.py looks for these names


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def more_flags(name: str = "PORTLLM_CXXFLAGS") -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def torch_root() -> Path | str:
    """The directory of a usable torch, or why there is none."""
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build (use --no-build-isolation)"
    if torch.__version__ < TORCH_MIN:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_MIN))}"
    return Path(torch.__file__).parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    )


def cuda_targets(nvcc: str) -> list[str]:
    """What to compile for: machine code, and PTX for what is to come."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX;10.0").replace(" ", ";").split(";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    flags = []
    for name in filter(None, wanted):
        number, _, ptx = name.partition("+")
        number = number.replace(".", "")
        bare = number.rstrip("af")  # 9.0a and 10.0f are variants of 9.0 and 10.0
        if f"compute_{bare}" in known and int(bare) >= 80:  # cp.async and mma of bf16 came with that
            code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
    if not flags:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST={';'.join(wanted)} has no GPU from sm_80 on that nvcc knows")
    return flags


class BuildNative(build_ext):
    """Builds the libraries or, unless they are required, explains in one line why there will be none."""

    built = False

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library: no Python version in its name.
        return os.path.join(*fullname.split(".")) + ".so"

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
        if ext.name == CUDA and flag("PORTLLM_SKIP_CUDA_BUILD"):
            return "PORTLLM_SKIP_CUDA_BUILD is set"
        if sys.platform == "win32":
            return "only gcc and clang are supported"
        root = torch_root()
        if isinstance(root, str):
            return root
        ext.include_dirs = ["csrc", str(root / "include")]
        ext.library_dirs = [str(root / "lib")]
        try:
            if ext.name == CUDA:
                nvcc = find_nvcc()
                if nvcc is None:
                    return "there is no nvcc (CUDA_HOME or the PATH should lead to it)"
                self.add_kernels(ext, nvcc)
            self.compile_at_once()
            super().build_extension(ext)
        except Exception as error:  # whatever goes wrong in the compiler, the package must still install
            return f"{type(error).__name__}: {error}"
        return None

    def compile_at_once(self) -> None:
        """Let the compiler take as many files at once as there are cores."""
        compile_one = type(self.compiler).compile.__get__(self.compiler)

        def compile_all(files: list[str], *arguments: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda file: compile_one([file], *arguments, **options), files)
                return [target for targets in made for target in targets]

        self.compiler.compile = compile_all

    def add_kernels(self, ext: Extension, nvcc: str) -> None:
        """Compile the kernels with nvcc, for the linker to add."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources("cuda", "*.cu"):
            target = str(folder / f"{Path(source).stem}.cu.o")
            flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *cuda_targets(nvcc)]
            ext.extra_objects.append(target)
            if not self.force and not newer_group([source, *ext.depends], target):
                continue
            self.spawn([nvcc, *flags, *more_flags("PORTLLM_NVCCFLAGS"), "-Icsrc", "-c", source, "-o", target])
        # nvcc knows best where its libraries are: there are many ways to install CUDA.
        dry = subprocess.run([nvcc, "--dryrun", source], capture_output=True, text=True, check=True).stderr
        line = next(line for line in dry.splitlines() if "LIBRARIES=" in line)
        ext.library_dirs += re.findall(r"-L([^\"\s]+)", line)

    def leave_out(self, ext: Extension, why: str) -> None:
        kind = "library for CUDA" if ext.name == CUDA else "native library"
        if flag("PORTLLM_REQUIRE_CUDA" if ext.name == CUDA else "PORTLLM_REQUIRE_NATIVE"):
            raise RuntimeError(f"portllm: {kind} not built: {why}")
        print(f"portllm: {kind} not built: {why}", file=sys.stderr, flush=True)
        # A library left by an earlier build must not be taken for this one's.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        ext.optional = True  # tells setuptools not to look for the file


class Wheel(bdist_wheel):
    """Tags the wheel by platform only, or by nothing where it is pure."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if self.get_finalized_command("build_ext").built else "any"


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc", folder).glob(pattern))


def library(name: str, folder: str, libraries: list[str], *flags: str) -> Extension:
    return Extension(
        name,
        sources=sources(folder, "*.cpp"),
        depends=sources(folder, "*.h", "*.cuh", "*.cu") + sources("", "*.h"),
        language="c++",
        libraries=["torch_cpu", *libraries],  # torch by name only: it has been loaded before us
        define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}{0:012x}")],
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", *flags, *more_flags()],
        extra_link_args=more_flags(),
    )


setup(
    ext_modules=[
        library(
            CPU,
            "cpu",
            [],
            "-ffp-contract=off",  # which products are fused is part of the result's definition
            "-Wno-uninitialized",  # false alarms from gcc 12's own intrinsics
            "-Wno-maybe-uninitialized",
        ),
        # CUDA's runtime is linked in: torch has one of its own, of another version perhaps.
        library(CUDA, "cuda", ["cudart_static", "rt", "pthread", "dl"]),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
