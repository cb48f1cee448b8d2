"""The load of soak.sh, and its judgement. Only the standard library."""

import http.client
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse

ADDRESS = urllib.parse.urlparse(os.environ["ASHLAR_URL"]).netloc
PID = os.environ["ASHLAR_PID"]
SECONDS = 60 * float(os.environ.get("MINUTES", "30"))
CLIENTS = 32
# Memory may grow by this share after the first fifth of the time.
GROWTH = 0.02
counts, failures, lock = {}, [], threading.Lock()


def post(path, body, leave_after=None):
    """The status and text of an answer; `leave_after` bytes the client goes away."""
    connection = http.client.HTTPConnection(ADDRESS, timeout=120)
    try:
        connection.request("POST", path, body if isinstance(body, str) else json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if leave_after is not None:
            answer.read(leave_after)
            return answer.status, None
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def one(rng):
    """One request of a random kind: its kind, and what is wrong with its answer."""
    text = " ".join(rng.choice(["river", "stone", "quick", "seven", "blue"]) for _ in range(rng.randint(1, 150)))
    sampling = {"max_tokens": rng.randint(1, 150), "temperature": rng.choice([0, 1]), "seed": rng.randint(0, 9), "ignore_eos": rng.random() < 0.5}
    kind = rng.choice(["whole", "whole", "stream", "stream", "leave", "bad", "schema", "tool", "messages", "responses", "stop", "n", "embed"])
    if kind == "bad":
        bad = rng.choice(['{"prompt": 1e400}', "{", '{"prompt": "x", "n": 1000}', '{"prompt": "x", "structured_outputs": {"regex": "("}}'])
        status, _ = post("/v1/completions", bad)
        return kind, None if status in (400, 429) else status
    chat = {"messages": [{"role": "user", "content": text}]}
    if kind == "messages":
        status, body = post("/v1/messages", chat | {"max_tokens": sampling["max_tokens"]})
        return kind, None if status == 429 or status == 200 and json.loads(body)["type"] == "message" else (status, body)
    if kind == "responses":
        status, body = post("/v1/responses", {"input": text, "max_output_tokens": sampling["max_tokens"], "stream": True})
        return kind, None if status == 429 or status == 200 and re.search(r"event: response\.(completed|incomplete)", body) else (status, body)
    if kind == "schema":
        status, body = post("/v1/chat/completions", chat | sampling | {"response_format": {"type": "json_object"}})
        return kind, None if status in (200, 429) else (status, body)
    if kind == "tool":
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
        status, body = post("/v1/chat/completions", chat | sampling | {"tools": [tool], "tool_choice": "required"})
        return kind, None if status in (200, 429) else (status, body)
    if kind == "embed":
        status, body = post("/v1/embeddings", {"input": [text] * rng.randint(1, 5)})
        return kind, None if status == 429 or status == 200 and len(json.loads(body)["data"][0]["embedding"]) == 576 else (status, body)
    request = {"prompt": text} | sampling
    if kind == "n":
        request["n"] = rng.randint(2, 4)
    if kind == "stop":
        request["stop"] = ["e", "\n"]
    if kind == "leave":
        status, _ = post("/v1/completions", request | {"stream": True}, leave_after=rng.randint(1, 2000))
        return kind, None if status in (200, 429) else status
    if kind == "stream":
        status, body = post("/v1/completions", request | {"stream": True})
        whole = status == 200 and body.endswith("data: [DONE]\n\n") and '"error"' not in body
        return kind, None if status == 429 or whole else (status, body[-300:])
    status, body = post("/v1/completions", request)
    return kind, None if status in (200, 429) else (status, body)


def client(seed, until):
    rng = random.Random(seed)
    while time.monotonic() < until:
        try:
            kind, wrong = one(rng)
        except Exception as error:  # Lost, whatever it was.
            kind, wrong = "lost", repr(error)
        with lock:
            counts[kind] = counts.get(kind, 0) + 1
            if wrong is not None:
                failures.append((kind, wrong))


def metric(name):
    connection = http.client.HTTPConnection(ADDRESS, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def resident_kib():
    with open(f"/proc/{PID}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def main():
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=client, args=(seed, until)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS / 5)
    early = resident_kib()
    for thread in threads:
        thread.join()
    late = resident_kib()
    deadline = time.monotonic() + 30
    gauges = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    while any(metric(name) > 0 for name in gauges) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = {name: metric(name) for name in gauges if metric(name) > 0}
    growth = late / early - 1
    print(f"{sum(counts.values())} requests {counts}; {len(failures)} failed; {metric('vllm:num_preemptions_total'):.0f} preemptions; "
          f"left {left}; memory {early} -> {late} KiB ({growth:+.1%})")
    for failure in failures[:10]:
        print("  ", failure)
    sys.exit(bool(failures or left or growth > GROWTH))


main()
