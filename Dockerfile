# The gateway and the worker, from one build:
#
#     docker build --target gateway -t faashound-gateway .
#     docker build --target worker -t faashound-worker .
#
# BASE is any image with Python 3.11 or newer.  Without network: wheels in ./wheels and --build-arg PIP_NO_INDEX=1.

ARG BASE=python:3.13-slim-bookworm
FROM ${BASE} AS build
ARG PIP_NO_INDEX=0
WORKDIR /src
COPY pyproject.toml *.py py.typed wheel[s] ./
COPY network network
COPY calls calls
COPY queues queues
COPY functions functions
COPY draining draining
COPY serving serving
COPY ui ui
RUN python3 -m venv /opt/faashound && /opt/faashound/bin/pip install --no-cache-dir --find-links . '.[nats]'

FROM ${BASE} AS runtime
COPY --from=build /opt/faashound /opt/faashound
RUN install -d -o 65532 -g 65532 /var/lib/faashound
# An image is there to serve others; a spool must outlive the container, so mount a volume at its place.
ENV PATH=/opt/faashound/bin:$PATH host=0.0.0.0 queue_url=spool:/var/lib/faashound/spool
WORKDIR /var/lib/faashound
USER 65532:65532

# Healthy is what answers, 503 included: a swarm kills what is not, and that mends no full disk and brings back no broker.
FROM runtime AS worker
EXPOSE 8083
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python3", "-c", "from os import environ; from http.client import HTTPConnection; port = int(environ.get('metrics_port') or 8083); c = HTTPConnection('127.0.0.1', port, timeout=2); port and (c.request('GET', '/healthz'), c.getresponse())"]
ENTRYPOINT ["fworker"]

FROM runtime AS gateway
EXPOSE 8080 8082
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python3", "-c", "from os import environ; from http.client import HTTPConnection; c = HTTPConnection('127.0.0.1', int(environ.get('port') or 8080), timeout=2); c.request('GET', '/healthz'); c.getresponse()"]
ENTRYPOINT ["fgateway"]
