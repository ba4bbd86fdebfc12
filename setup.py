"""What pyproject.toml cannot say: two folders of the repository travel inside the package, where
quantflow/bundled.py finds them."""

from setuptools import find_packages, setup

SHARED = {"quantflow.share.recipes": "recipes", "quantflow.share.calib_data": "calib_data"}

# kernels/ has no __init__.py, so that its package is quantflow_kernels and nothing is called
# `kernels`.
setup(
    py_modules=["quantflow_llm"],  # outside of the folder that another project may share
    packages=[*find_packages(include=["quantflow*"]), *find_packages("kernels"), *SHARED],
    package_dir={"quantflow_kernels": "kernels/quantflow_kernels", **SHARED},
    package_data={
        "quantflow": ["py.typed", "serve/page/*", "report/templates/*"],
        "quantflow_kernels": ["*.c"],
        "quantflow.share.recipes": ["*.yaml"],
        "quantflow.share.calib_data": ["**/*"],
    },
)
