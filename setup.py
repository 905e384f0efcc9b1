"""Builds the C++ extension with CMake; everything else stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_program(name):
    """The program beside this interpreter, where pip puts it, or else on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


class CMakeBuild(build_ext):
    """One CMake run for all extensions; `CMAKE_ARGS` and `CMAKE_BUILD_PARALLEL_LEVEL` are honoured."""

    def build_extensions(self):
        cmake, ninja = find_program("cmake"), find_program("ninja")
        if cmake is None:
            raise SystemExit("tinyres needs CMake >= 3.18 to build: pip install cmake")
        import pybind11

        # A folder of its own, kept between builds: pip's temporary one would compile everything each time.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        configure = [
            *(cmake, "-S", ROOT, "-B", build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self.kept(pybind11) / 'share/cmake/pybind11'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DTINYRES_CUDA={os.environ.get('TINYRES_CUDA', 'AUTO')}",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)

    @staticmethod
    def kept(package):
        """A copy of `package` in build/: pip unpacks it afresh each time, elsewhere, and all would be compiled anew."""
        folder = ROOT / "build" / f"{package.__name__}-{package.__version__}"
        if not folder.exists():
            draft = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(Path(package.__file__).parent, draft)
            draft.rename(folder)
        return folder


EXTENSIONS = [
    Extension("tinyres._cpu", sources=[]),
    Extension("tinyres._emulated", sources=[]),
    Extension("tinyres._cuda", sources=[], optional=True),  # where nvcc is found
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
