# An image for NVIDIA GPUs (a driver for CUDA 13 on the host). From the root of the clone:
#
#   docker build --file=launch/docker/cuda.Dockerfile --tag=REGISTRY/flexolmo-cuda .
FROM python:3.12.12-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /flexolmo
# Packages first: they change less often than the code.
COPY requirements.txt launch/docker/cuda.txt ./
RUN pip install --no-deps --requirement=requirements.txt --requirement=cuda.txt
COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY configs configs
COPY flexolmo_jax flexolmo_jax
RUN pip install --no-deps --no-build-isolation --editable . && useradd --create-home --uid=1000 flexolmo
ARG USER=1000
USER ${USER}
ENTRYPOINT ["flexolmo"]
