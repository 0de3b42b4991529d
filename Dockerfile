FROM python:3.13-slim
WORKDIR /faces

# The dependencies are a layer of their own, which a change of server.py does not rebuild.
COPY requirements.txt .
RUN pip install --no-cache-dir --no-compile -r requirements.txt

COPY . .
USER nobody
ENV PYTHONDONTWRITEBYTECODE=1
EXPOSE 8282
HEALTHCHECK --interval=2s --timeout=2s CMD ["python", "-ISc", \
    "from http.client import *; c = HTTPConnection('127.0.0.1', 8282, 2); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]

# docker run faces [OPTIONS] runs the server, docker run faces COMMAND another command, such as pytest.
ENTRYPOINT ["sh", "-c", "case ${1:--} in -*) exec python server.py --host 0.0.0.0 \"$@\";; *) exec \"$@\";; esac", "faces"]
