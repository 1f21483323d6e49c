# One image for both services of compose.yaml: the trunk server and the page.
FROM python:3.11-slim

# The package index that torch comes from; when empty, pip's own, whose torch brings CUDA's libraries with it.
ARG TORCH_INDEX_URL=
# What more to install: requirements-ray.txt for trunk servers on Ray, or nothing.
ARG MORE_REQUIREMENTS=

ENV PYTHONUNBUFFERED=1 \
    SPLITLEARN_CACHE=/cache/models \
    HF_HOME=/cache/huggingface \
    GRADIO_ANALYTICS_ENABLED=False

# A volume takes its owner from the folder in the image. The user has a name, since torch looks it up.
RUN useradd --uid 10001 --create-home splitlearn \
    && mkdir -p /cache /srv/lab /home/splitlearn/.ray && chown 10001:10001 /cache /srv/lab /home/splitlearn/.ray

WORKDIR /srv
COPY requirements.txt requirements-ray.txt ./
RUN grep '^torch==' requirements.txt >torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt \
    && pip install --no-cache-dir -r requirements.txt ${MORE_REQUIREMENTS:+-r "$MORE_REQUIREMENTS"}

# The default model's weights are part of the image, and a fresh cache volume starts with them: a running container
# needs no network. They come before what changes more often and has no say in them.
COPY splitlearn splitlearn
USER 10001:10001
RUN python -m splitlearn fetch

COPY app.py ./
COPY server server
COPY ui ui
