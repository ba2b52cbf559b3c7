# A Ray node with the model side: head, worker, and the node beside the gateway. No gateway code, no token library.
#
#     docker build -f docker/serve.Dockerfile -t sluice-serve .
#
# Not built so far: this file was linted and its commands were run as processes, without a container engine.
#
# PYTHON_IMAGE and PIP_EXTRA_INDEX_URL: as in gateway.Dockerfile. Both images need the same Python: Ray insists on it.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sluice
ENV PATH=/opt/sluice/bin:${PATH}
WORKDIR /src
COPY constraints.txt ./
# What serve_app imports to serve; constraints.txt holds the versions, of these and of everything below them.
RUN pip install --only-binary :all: --constraint constraints.txt \
    cryptography numpy pydantic "ray[serve]" safetensors torch

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Sluice model server" \
      org.opencontainers.image.description="Ray node that serves Sluice's CNN+LSTM model"
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp sluice
COPY --from=build /opt/sluice /opt/sluice
COPY serve_app /opt/serve/serve_app
ENV PATH=/opt/sluice/bin:${PATH} \
    PYTHONPATH=/opt/serve \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
# The agent that every Ray node runs; it says whether the node's raylet lives.
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=4)"]
CMD ["ray", "start", "--help"]
