"""The process that runs chat templates, started by lljax/data/render.py.

Reads requests from stdin and answers on stdout; both are 8 bytes of length, then JSON. Ends with
its input. Imports nothing of lljax.
"""

import contextlib
import json
import os
import sys


def bound_memory(room: int) -> None:
    """Limits this process to `room` bytes more than it has now."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer(request: dict, job: dict, longest: int) -> dict:
    """{text, spans} of a rendering, or {error, kind} of an exception."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [job["messages"]],
            chat_template=request["template"],
            **request["special_tokens"] | job["options"],
        )
        if len(texts[0]) > longest:
            raise MemoryError
        return {"text": texts[0], "spans": spans[0] if spans else []}
    except MemoryError:
        return {"error": "", "kind": "MemoryError"}
    except Exception as error:  # a template may raise any class
        return {"error": str(error)[:1000], "kind": type(error).__name__}


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints do not mix with the answers
    import transformers.utils.chat_template_utils  # noqa: F401  slow, and not part of the limit

    bound_memory(int(sys.argv[1]))
    while header := requests.read(8):
        size = int.from_bytes(header)
        request, longest = json.loads(requests.read(size)), max(int(sys.argv[2]), 16 * size)
        reply = json.dumps([answer(request, job, longest) for job in request["jobs"]]).encode()
        answers.write(len(reply).to_bytes(8) + reply)
        answers.flush()


if __name__ == "__main__":
    main()
