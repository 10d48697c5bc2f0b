# One image for SuperLink, SuperNodes and the apps they start: pinned versions, no root, no compiler left behind.
FROM python:3.11.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bayesfed bayesfed
COPY strategies strategies
COPY clients clients
COPY conf conf
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .

FROM python:3.11.11-slim-bookworm
RUN groupadd --gid 10001 bayesfed && useradd --uid 10001 --gid 10001 --create-home bayesfed \
    && install -d -o bayesfed -g bayesfed /runs /sites /data /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 \
    FLWR_HOME=/home/bayesfed/.flwr BAYESFED_RUNS=/runs BAYESFED_SITES=/sites BAYESFED_DATA=/data
USER bayesfed
WORKDIR /home/bayesfed
VOLUME ["/runs", "/sites", "/state"]
