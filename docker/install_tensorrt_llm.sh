#!/usr/bin/env bash
# Makes an environment with TensorRT-LLM 1.2 and Ray, in whose Python engine.name=tensorrt_llm starts its processes.
# TensorRT-LLM wants other versions of torch, protobuf and more than NeMo and PyTriton do.
#
#   bash docker/install_tensorrt_llm.sh [DIRECTORY]        /opt/tensorrt_llm
#
# PYTHON   an interpreter with pip; TensorRT-LLM 1.2 has wheels for Python 3.10 and 3.12
set -euo pipefail
environment=${1:-/opt/tensorrt_llm}
python=${PYTHON:-python}
# the image's constraints are for its own packages
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

"$python" -m venv --without-pip "$environment"
install=("$python" -m pip --python "$environment/bin/python" install)
# torch first, for the CUDA that TensorRT-LLM's wheel was built with: PyPI's torch 2.9.1 is for another
"${install[@]}" torch==2.9.1 torchvision --index-url https://download.pytorch.org/whl/cu130
# Ray: it imports PlacementGroupSchedulingStrategy from ray.util.placement_group, where Ray 2.60 has it no more
"${install[@]}" "tensorrt_llm==1.2.*" ray==2.54.0 --extra-index-url https://pypi.nvidia.com
"$environment/bin/python" -c 'from importlib.metadata import version
print("tensorrt_llm", version("tensorrt_llm"), "torch", version("torch"), "ray", version("ray"))'
