# docker build -t sparseserve .                          CUDA, the default
# docker build -t sparseserve --build-arg VARIANT=cpu .  without CUDA: name an index with CPU builds of
#                                                        torch in PIP_EXTRA_INDEX_URL, or get the large one
# --build-arg EXTRAS=otel,gpu adds flash-attn-4, for long prompts on Hopper and Blackwell.
ARG PYTHON_VERSION=3.12
ARG VARIANT=cuda

FROM python:${PYTHON_VERSION}-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ARG EXTRAS=otel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/sparseserve
# What changes seldom comes first: a change of our code rebuilds no layer with torch in it.
COPY constraints.txt ./
RUN /opt/sparseserve/bin/python -m pip install --constraint constraints.txt torch
COPY pyproject.toml README.md ./
COPY service ./service
COPY sparse_methods ./sparse_methods
RUN /opt/sparseserve/bin/python -m pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON_VERSION}-slim AS runtime-cpu
ENV SPARSESERVE_DEVICE=cpu

# Triton compiles each kernel's launcher, a small C file against Python.h, when the kernel first runs;
# what it needs is a C compiler with the headers of libc, and nothing else.
FROM python:${PYTHON_VERSION}-slim AS runtime-cuda
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility SPARSESERVE_DEVICE=cuda

# hadolint ignore=DL3006
FROM runtime-${VARIANT} AS runtime
LABEL org.opencontainers.image.title="sparseserve" \
      org.opencontainers.image.description="Serves a causal LM whose sparse attention method each request chooses."
RUN groupadd --gid 10001 sparseserve && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin sparseserve
COPY --from=build /opt/sparseserve /opt/sparseserve
# The root file system may be read-only: all that is ever written goes below /tmp, which must allow
# executing files, since Triton loads the launchers it compiled from there.
ENV PATH=/opt/sparseserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp TRITON_CACHE_DIR=/tmp/triton \
    HF_HUB_OFFLINE=1 \
    SPARSESERVE_HOST=0.0.0.0 SPARSESERVE_PORT=8000
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['SPARSESERVE_PORT']}/health/ready\", timeout=2)"]
ENTRYPOINT ["sparseserve"]
CMD ["serve"]
