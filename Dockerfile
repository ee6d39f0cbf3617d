# raycluster and all it needs, for the nodes of a cluster (configs/cluster).
#
#   docker build -t REGISTRY/raycluster:cpu .
#   docker build -t REGISTRY/raycluster:cuda --build-arg TORCH=cu130 .
#
# TORCH: the build of torch, by uv's names: cpu, cu126, cu130, ... PYTHON: 3.10 to 3.13.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG TORCH=cpu

# gcc builds the kernel of k-means, wget is KubeRay's probe of a pod, curl reads the clouds' notices, rsync is the launcher's.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl gcc libc6-dev make rsync wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /raycluster
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_TORCH_BACKEND=${TORCH}
COPY Makefile pyproject.toml README.md LICENSE ./
COPY raycluster raycluster
RUN make setup
COPY jobs jobs
COPY configs configs

# A job that is stopped has two minutes to save. Launchers start Ray in login shells, which begin with a PATH of their own.
ENV PATH=/raycluster/.venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_JOB_STOP_WAIT_TIME_S=120
RUN echo 'PATH=/raycluster/.venv/bin:$PATH' > /etc/profile.d/raycluster.sh \
    && bash -lc 'test "$(command -v ray)" = /raycluster/.venv/bin/ray'
