"""A wheel that carries compiled CUDA kernels (sgl_blend/_cuda) is of this platform alone."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        carried = (Path(__file__).parent / "sgl_blend" / "_cuda").glob("*.so")
        self.root_is_pure = not any(carried)

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"bdist_wheel": Wheel})
