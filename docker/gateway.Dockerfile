# The gateway, and the command `sluice`.
#
#     docker build -f docker/gateway.Dockerfile -t sluice-gateway .
#
# Not built so far: this file was linted and its commands were run as processes, without a container engine.
#
# PYTHON_IMAGE may name a digest. PIP_EXTRA_INDEX_URL may name an index that has the CPU build of torch; without one
# pip takes PyPI's, which brings CUDA and some gigabytes with it.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sluice
ENV PATH=/opt/sluice/bin:${PATH}
WORKDIR /src
# The dependencies in a layer of their own, installed for empty packages: it stays while only our code changes.
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir app serve_app && touch app/__init__.py serve_app/__init__.py && \
    pip install --only-binary :all: --constraint constraints.txt .
COPY app app
COPY serve_app serve_app
RUN pip install --no-deps --force-reinstall .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Sluice gateway" \
      org.opencontainers.image.description="FastAPI gateway in front of a Ray Serve deployment of a CNN+LSTM model"
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/sluice sluice && \
    install --directory --owner sluice --group sluice --mode 0700 /var/lib/sluice
COPY --from=build /opt/sluice /opt/sluice
ENV PATH=/opt/sluice/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MODEL_REGISTRY_PATH=/models \
    GATEWAY_STATE_DIR=/var/lib/sluice \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_PORT=8000
WORKDIR /var/lib/sluice
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
CMD ["sluice", "serve"]
