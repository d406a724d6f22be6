# The agent with all it needs, made by the same script as on any machine.
#
#   docker build -t ovation-agent .
#   docker run --env-file agent.env -p 127.0.0.1:8080:8080 -v ovation-agent:/var/lib/ovation-agent CONTAINER-OPTIONS ovation-agent
#
# The agent starts Apptainer containers inside this one. For that Docker must let it make user namespaces, mount in them
# and use FUSE, which its defaults forbid. CONTAINER-OPTIONS is either
#   --device /dev/fuse --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined
# or, where that is not enough (user namespaces switched off on the host, for instance), --privileged.
# `docker run ... ovation-agent doctor` says whether containers can run, and what is missing if not.
FROM python:3.13-slim-bookworm

WORKDIR /opt/ovation-agent
COPY . .
RUN UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 config/setup \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ovation-agent \
    && install -d -o ovation-agent -g ovation-agent -m 0700 /var/lib/ovation-agent

ENV PATH=/opt/ovation-agent/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AGENT_HOST=0.0.0.0 \
    AGENT_DATA_DIR=/var/lib/ovation-agent
USER 1000:1000
WORKDIR /var/lib/ovation-agent
VOLUME /var/lib/ovation-agent
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('AGENT_PORT', '8080')}/healthz\", timeout=4)"]
ENTRYPOINT ["ovation-agent"]
CMD ["serve"]
