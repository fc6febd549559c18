# syntax=docker/dockerfile:1
# Three images (docs/docker.md):
#   docker build --target cpu    -t simprune-deploy:cpu .      verify, inspect: no GPU, no PyTorch
#   docker build --target export -t simprune-deploy:export .   with PyTorch: export and its parity check
#   docker build                 -t simprune-deploy .          TensorRT and the plugin, for a GPU
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm
# the container whose TensorRT has the version below: NVIDIA's support matrix
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.07-py3

# ---- The project as a wheel, and what each image must install before it
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY docker/requirements.py docker/
COPY pyproject.toml ./
RUN mkdir /dist \
    && python docker/requirements.py cpu > /dist/cpu.txt \
    && python docker/requirements.py cpu export > /dist/export.txt \
    && python docker/requirements.py cpu engine > /dist/gpu.txt \
    && python docker/requirements.py > /dist/plain.txt
COPY LICENSE README.md ./
COPY plugins plugins
COPY simprune_deploy simprune_deploy
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# ---- The plugin: nvcc and TensorRT's headers come with NVIDIA's image
FROM ${TENSORRT_IMAGE} AS plugin
ARG PLUGIN_ARCH=all
COPY constraints.txt /tmp/
COPY --from=wheel /dist /dist
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c /tmp/constraints.txt -r /dist/plain.txt cmake==3.31.6 \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps /dist/*.whl
RUN /opt/venv/bin/simprune-deploy plugin build --arch "${PLUGIN_ARCH}" --output /opt/simprune-plugin

# ---- What all images have: a user that is not root, and a place for results
FROM ${PYTHON_IMAGE} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --user-group --create-home simprune \
    && install -d -o simprune -g simprune /work
COPY constraints.txt /opt/simprune/
WORKDIR /work
ENTRYPOINT ["simprune-deploy"]
CMD ["doctor"]

# ---- Without a GPU and without PyTorch
FROM base AS cpu
COPY --from=wheel /dist/cpu.txt /opt/simprune/
RUN pip install --no-cache-dir -c /opt/simprune/constraints.txt -r /opt/simprune/cpu.txt
COPY --from=wheel /dist/*.whl /opt/simprune/
RUN pip install --no-cache-dir --no-deps /opt/simprune/*.whl
USER 10001:10001

# ---- With PyTorch
FROM base AS export
COPY --from=wheel /dist/export.txt /opt/simprune/
RUN pip install --no-cache-dir -c /opt/simprune/constraints.txt -r /opt/simprune/export.txt
COPY --from=wheel /dist/*.whl /opt/simprune/
RUN pip install --no-cache-dir --no-deps /opt/simprune/*.whl
USER 10001:10001

# ---- TensorRT and the plugin; the driver comes from the host (docker run --gpus all)
FROM base AS runtime
ARG TENSORRT_VERSION=11.1.0.106
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir "tensorrt-cu13==${TENSORRT_VERSION}"
COPY --from=wheel /dist/gpu.txt /opt/simprune/
RUN pip install --no-cache-dir -c /opt/simprune/constraints.txt -r /opt/simprune/gpu.txt
COPY --from=plugin /opt/simprune-plugin /opt/simprune-plugin
COPY --from=wheel /dist/*.whl /opt/simprune/
RUN pip install --no-cache-dir --no-deps /opt/simprune/*.whl
ENV SIMPRUNE_LIBRARY=/opt/simprune-plugin/libsimprune_plugin.so
USER 10001:10001
