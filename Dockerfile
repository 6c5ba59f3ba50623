# syntax=docker/dockerfile:1
# The platform as an image: target `cpu` for processors, `cuda` for NVIDIA's GPUs; both with the packages of
# constraints.txt. Target `s3` is the S3 server of docker-compose.yml, with a folder that its user may write to.
ARG PYTHON=python:3.11.15-slim-bookworm

FROM ${PYTHON} AS sources
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /build
# What the package needs is installed with an empty package in its place: another line of code installs nothing anew.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p platform/aquilamoe conf docs/studies && echo '__version__ = "0"' > platform/aquilamoe/__init__.py

# torch comes first: other packages would draw another build of it.
FROM sources AS cpu-packages
ARG TORCH_CPU_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} torch
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[services]' && pip uninstall --yes aquilamoe

FROM sources AS cuda-packages
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt torch \
    && python -c "import torch; assert torch.version.cuda, f'torch {torch.__version__} is built without CUDA'"
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[services]' && pip uninstall --yes aquilamoe

FROM ${PYTHON} AS platform
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app/platform PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid 1000 efficientscale \
    && useradd --uid 1000 --gid 1000 --create-home efficientscale \
    && install --directory --owner=1000 --group=1000 /runs
WORKDIR /app
COPY deploy ./deploy
COPY conf ./conf
COPY workflows ./workflows
COPY platform ./platform
USER 1000:1000
ENTRYPOINT ["python", "/app/deploy/entrypoint.py"]
CMD ["python", "/app/workflows/efficientscale.py", "--help"]

FROM platform AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv

FROM platform AS cuda
COPY --from=cuda-packages /opt/venv /opt/venv

FROM versity/versitygw:v1.8.0 AS s3
RUN mkdir /data && chown 1000:1000 /data
USER 1000:1000
