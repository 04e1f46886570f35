"""Labels of one raw 16-bit frame, with gRPC and protobuf alone: what a client in any language has to do.

    frame.raw: rows × cols uint16, little end first ──▶ segment_NAME ──▶ labels.raw: rows × cols uint8 (or uint16)

Compile the protocol first, into any folder that Python looks in:

    mkdir compiled
    python -m grpc_tools.protoc -I docs/examples --python_out=compiled --grpc_python_out=compiled docs/examples/kserve_v2.proto
    PYTHONPATH=compiled python docs/examples/plain_grpc.py frame.raw 1024 1024 --model segment_cells --out labels.raw

Exit codes: 0 done, 1 failed, 2 asked for wrongly.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import grpc
import kserve_v2_pb2 as messages
import kserve_v2_pb2_grpc as services

# The server is starting, or was restarted, or its queue is full: the same request can be sent again.
WORTH_ANOTHER_TRY = (grpc.StatusCode.UNAVAILABLE,)
PAUSE_S = 0.5
OPTIONS = [
    # gRPC's own limit is 4 MiB a message.
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    # A server on this side of the firewall is not reached through a proxy for the web.
    ("grpc.enable_http_proxy", 0),
]


def request(frame: bytes, rows: int, cols: int, model: str, request_id: str) -> messages.ModelInferRequest:
    """The message that asks for the labels of one frame."""
    message = messages.ModelInferRequest(model_name=model, id=request_id)
    message.inputs.add(name="image_uint16", datatype="UINT16", shape=[1, rows, cols])
    message.raw_input_contents.append(frame)
    message.outputs.add(name="labels")
    message.parameters["priority"].uint64_param = 1
    return message


def infer(
    stub: services.GRPCInferenceServiceStub, message: messages.ModelInferRequest, timeout_s: float
) -> messages.ModelInferResponse:
    """Send until an answer comes, within one deadline for all attempts.

    Raises
    ------
    grpc.RpcError
        The request was refused, or the deadline is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        # A request whose client has given up is not worked on: it leaves the server's queue at the same moment.
        message.parameters["timeout"].int64_param = max(1, int(left_s * 1e6))
        try:
            return stub.ModelInfer(message, timeout=left_s)
        except grpc.RpcError as error:
            if error.code() not in WORTH_ANOTHER_TRY or time.monotonic() + PAUSE_S >= deadline:
                raise
            time.sleep(PAUSE_S)


def main() -> int:
    """Read, ask, write."""
    parser = argparse.ArgumentParser(description="Labels of one raw 16-bit frame.")
    parser.add_argument("frame", type=Path, help="rows × cols uint16, little end first, without a header")
    parser.add_argument("rows", type=int)
    parser.add_argument("cols", type=int)
    parser.add_argument("--server", default="127.0.0.1:8001", help="HOST:PORT")
    parser.add_argument("--model", required=True, help="segment_NAME")
    parser.add_argument("--out", type=Path, required=True, help="rows × cols labels, without a header")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds, for all attempts together")
    asked = parser.parse_args()

    frame = asked.frame.read_bytes()
    if len(frame) != 2 * asked.rows * asked.cols:
        parser.error(f"{asked.frame} holds {len(frame)} bytes, expected 2 × {asked.rows} × {asked.cols}")
    message = request(frame, asked.rows, asked.cols, asked.model, f"{asked.frame.name}-{os.getpid()}")
    with grpc.insecure_channel(asked.server, options=OPTIONS) as channel:
        try:
            answer = infer(services.GRPCInferenceServiceStub(channel), message, asked.timeout)
        except grpc.RpcError as error:
            print(f"{asked.server}, {asked.model}, request {message.id}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    labels, content = answer.outputs[0], answer.raw_output_contents[0]
    asked.out.write_bytes(content)
    print(f"{asked.out}: {labels.datatype} of shape {list(labels.shape)[1:]}, version {answer.model_version}, id {answer.id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
