# docker build -t influence .
# docker run -v $PWD/out:/out influence                                   the smoke figures
# docker run -v $PWD/out:/out -v DATA:/data:ro influence fig2 --preset paper
# Files in /out belong to user 1000; add --user $(id -u) to make them yours (mkdir out first).
FROM python:3.11-slim-bookworm

# For a GPU: --build-arg TENSORFLOW='tensorflow[and-cuda]'; the version is that of requirements.txt.
ARG TENSORFLOW=tensorflow
WORKDIR /app
COPY requirements.txt .
RUN sed "s/^tensorflow==/${TENSORFLOW}==/" requirements.txt > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --root-user-action=ignore \
        --disable-pip-version-check -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Any user may write to the home and to /out, for `docker run --user`.
RUN useradd --uid 1000 --home-dir /home/influence --create-home influence \
    && mkdir /out /data && chmod 1777 /home/influence /out
ENV HOME=/home/influence \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    INFLUENCE_DATA=/data \
    INFLUENCE_OUT=/out

COPY influence_console.py .
COPY influence influence
COPY data data
COPY experiments experiments
# --build-arg COMMIT=$(git rev-parse HEAD): the records name it. Last, so that it spoils no cache.
ARG COMMIT=
ENV INFLUENCE_COMMIT=$COMMIT

USER influence
ENTRYPOINT ["python", "-m", "experiments"]
CMD ["all", "--preset", "smoke"]
