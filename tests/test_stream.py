"""The frame stream: against a server that the test scripts, through a network that it breaks, and against Triton."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tifffile
from tritonclient.grpc import service_pb2 as pb

from phaseline.clients import stream_servers
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.stream import Busy, Counts, Frame, FrameResult, FrameStream
from phaseline.runtime.errors import (
    ImageError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)
from tests.proxy import Proxy
from tests.serving import frame as picture

if TYPE_CHECKING:
    from phaseline.triton_models.server import TritonServer

Answer = Callable[[Any, Any], Awaitable[Any]]
UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL
SMALL = np.arange(12, dtype=np.uint8).reshape(3, 4)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run to its end, after which no task is left."""

    async def whole() -> None:
        await scenario
        # The fake server's own tasks may end a moment after the answer that they gave.
        end = asyncio.get_running_loop().time() + 10
        while len(asyncio.all_tasks()) > 1 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


class FakeServer:
    """Serves one recipe; labels are pixels + 1. `answer` may be replaced; `asked` counts the attempts by frame id.

    The first `starts` questions for the recipe find it not ready.
    """

    def __init__(self, channels: int = 1, kind: str | None = None, recipe_hash: str = "a" * 64, max_pixels: int = 1000) -> None:
        classes = {"values": [1, 2], "names": ["dark", "bright"], "colours": ["#e69f00", "#56b4e9"]}
        recipe = {"hash": recipe_hash, "bundle": None, "version": 3, "classes": classes, "image_channels": channels,
                  "window_kind": kind}
        self.parameters = {"recipe": json.dumps(recipe), "max_pixels": str(max_pixels)}
        self.asked: dict[str, int] = {}
        self.answer: Answer = self.good
        self.model = "segment_cells"
        self.starts = self.described = 0

    @staticmethod
    async def good(request: Any, context: Any) -> Any:
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="3", id=request.id)
        for output in request.outputs:
            shape = request.inputs[0].shape[:3]
            response.outputs.add(name=output.name, datatype="UINT8", shape=shape)
            pixels = np.frombuffer(request.raw_input_contents[0], request.inputs[0].datatype.lower()) if shape else np.empty(0)
            response.raw_output_contents.append((pixels[: int(np.prod(shape))] + 1).astype(np.uint8).tobytes())
        return response

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        from tritonclient.grpc import service_pb2_grpc

        fake = self

        class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
            async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
                fake.described += 1
                if fake.starts:
                    fake.starts -= 1
                    await context.abort(UNAVAILABLE, "Request for unknown model: 'segment_cells' is not found")
                if request.name != fake.model:
                    await context.abort(UNAVAILABLE, f"Request for unknown model: '{request.name}' is not found")
                answer = pb.ModelConfigResponse()
                for name, value in fake.parameters.items():
                    answer.config.parameters[name].string_value = value
                return answer

            async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                fake.asked[request.id] = fake.asked.get(request.id, 0) + 1
                return await fake.answer(request, context)

        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)


def failing(times: int, code: Any, details: str) -> Answer:
    """Fails so often for each frame, and is good from then on."""
    failures: dict[str, int] = {}

    async def answer(request: Any, context: Any) -> Any:
        failures[request.id] = failures.get(request.id, 0) + 1
        if failures[request.id] <= times:
            await context.abort(code, details)
        return await FakeServer.good(request, context)

    return answer


async def silent(request: Any, context: Any) -> Any:
    await asyncio.sleep(60)


async def rest(stream: FrameStream) -> list[FrameResult]:
    stream.end_input()
    return [result async for result in stream.results()]


async def next_result(stream: FrameStream) -> FrameResult:
    return await anext(aiter(stream.results()))


def check_sum(counts: Counts) -> None:
    assert counts.sent == counts.done + counts.late + counts.failed + counts.busy + counts.waiting


def test_frames_become_results() -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as address, FrameStream(address, "cells", confidence=True) as stream:
            assert (stream.recipe.version, stream.recipe.classes.names) == (3, ("dark", "bright"))
            reused = SMALL.copy()
            await stream.send(Frame("one", reused, 12.5, {"exposure_s": 0.1}))
            reused[:] = 0  # A detector's buffer is written again.
            await stream.send(Frame("stack", np.stack([SMALL, SMALL])))
            await stream.send(Frame("big end first", SMALL.astype(">u2")))
            one, stack, swapped = await rest(stream)
            assert (one.id, one.timestamp, one.metadata, one.status, one.version) == ("one", 12.5, {"exposure_s": 0.1}, "done", 3)
            assert one.labels is not None and one.confidence is not None and one.error is None
            assert np.array_equal(one.labels, SMALL + 1) and one.confidence.shape == SMALL.shape
            assert stack.labels is not None and stack.labels.shape == (2, 3, 4)
            assert swapped.labels is not None and np.array_equal(swapped.labels, SMALL + 1)
            assert stream.counts == Counts(sent=3, done=3)
            with pytest.raises(UsageError, match="after the end of the input"):
                stream.offer(Frame("more", SMALL))

    run(scenario())


@pytest.mark.parametrize(("ordered", "expected"), [(True, ["slow", "fast"]), (False, ["fast", "slow"])])
def test_in_order_or_as_they_come(ordered: bool, expected: list[str]) -> None:
    async def scenario() -> None:
        fake, let_go = FakeServer(), asyncio.Event()

        async def answer(request: Any, context: Any) -> Any:
            if request.id == "slow":
                await let_go.wait()
            return await fake.good(request, context)

        fake.answer = answer
        async with fake.listening() as address, FrameStream(address, "cells", ordered=ordered) as stream:
            await stream.send(Frame("slow", SMALL))
            await stream.send(Frame("fast", SMALL))
            if not ordered:
                assert (await next_result(stream)).id == expected.pop(0)
            let_go.set()
            assert [result.id for result in await rest(stream)] == expected

    run(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_counts_add_up_whatever_happens(seed: int) -> None:
    async def scenario() -> None:
        chance, fake = random.Random(seed), FakeServer()

        async def answer(request: Any, context: Any) -> Any:
            await asyncio.sleep(chance.uniform(0, 0.01))
            match chance.randrange(6):
                case 0:
                    await context.abort(UNAVAILABLE, "Exceeds maximum queue size")
                case 1:
                    await context.abort(INTERNAL, "broken")
                case 2:
                    await asyncio.sleep(60)
            return await fake.good(request, context)

        fake.answer = answer
        settings: dict[str, Any] = {"in_flight": 4, "deadline_s": 0.15, "ordered": bool(seed % 2)}
        async with fake.listening() as address, FrameStream(address, "cells", **settings) as stream:
            accepted, delivered = [], []
            for i in range(60):
                if chance.random() < 0.5:
                    full = stream.counts.waiting == 4
                    refused = stream.offer(Frame(str(i), SMALL))
                    assert (refused is not None) == full
                    accepted += [] if refused else [str(i)]
                    check_sum(stream.counts)
                if stream.counts.waiting and chance.random() < 0.4:
                    delivered.append(await next_result(stream))
                    check_sum(stream.counts)
                await asyncio.sleep(chance.uniform(0, 0.01))
            delivered += await rest(stream)
            counts = stream.counts
            check_sum(counts)
            ids = [result.id for result in delivered]
            assert sorted(ids) == sorted(accepted)
            assert not seed % 2 or ids == accepted
            assert counts.waiting == 0 and counts.done + counts.late + counts.failed == len(accepted)
            assert counts.sent == counts.busy + len(accepted)
            for result in delivered:
                expected = {"done": type(None), "late": ServerTimeoutError, "failed": ServerFailedError}[result.status]
                assert type(result.error) is expected and (result.labels is None) == (result.status != "done")

    run(scenario())


def test_busy_until_results_are_read() -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as address, FrameStream(address, "cells", in_flight=2) as stream:
            assert stream.offer(Frame("a", SMALL)) is None
            assert stream.offer(Frame("b", SMALL)) is None
            refused = stream.offer(Frame("c", SMALL))
            assert isinstance(refused, Busy) and refused.id == "c" and refused.retry_after_s > 0
            waiting = asyncio.create_task(stream.send(Frame("d", SMALL)))
            await asyncio.sleep(0.2)  # Answers have come, and are not read.
            assert not waiting.done() and isinstance(stream.offer(Frame("e", SMALL)), Busy)
            assert stream.counts == Counts(sent=4, busy=2, waiting=2)
            assert (await next_result(stream)).id == "a"
            await waiting
            # What is known of the answers' time decides: two in flight, each as long as the first two were.
            estimate = stream.offer(Frame("f", SMALL))
            assert estimate is not None and 0.005 <= estimate.retry_after_s < 5.0
            assert [result.id for result in await rest(stream)] == ["b", "d"]
            assert stream.counts == Counts(sent=6, busy=3, done=3)

    run(scenario())


@pytest.mark.parametrize(("code", "details"), [
    (UNAVAILABLE, "Socket closed"),
    (UNAVAILABLE, "Exceeds maximum queue size"),
    (UNAVAILABLE, "Request for unknown model: 'segment_cells' is not found"),
    (INTERNAL, "Stub process 'segment_cells' is not healthy."),
])
def test_what_passes_is_tried_again(code: Any, details: str) -> None:
    async def scenario() -> None:
        fake = FakeServer()
        fake.answer = failing(2, code, details)
        async with fake.listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", SMALL))
            (result,) = await rest(stream)
            assert result.status == "done" and fake.asked == {"a": 3}

    run(scenario())


@pytest.mark.parametrize(("code", "error"), [
    (grpc.StatusCode.INVALID_ARGUMENT, ServerRefusedError), (INTERNAL, ServerFailedError),
])
def test_what_would_fail_again_fails_at_once(code: Any, error: type[Exception]) -> None:
    async def scenario() -> None:
        fake = FakeServer()
        fake.answer = failing(1, code, "the reason")
        async with fake.listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", SMALL))
            (result,) = await rest(stream)
            assert result.status == "failed" and type(result.error) is error and "the reason" in str(result.error)
            assert result.error.__traceback__ is result.error.__cause__ is result.error.__context__ is None
            assert fake.asked == {"a": 1} and result.labels is None and stream.counts == Counts(sent=1, failed=1)

    run(scenario())


@pytest.mark.parametrize("change", ["id", "version", "shape", "dtype", "missing", "short"])
def test_an_answer_to_something_else_is_a_failure(change: str) -> None:
    async def scenario() -> None:
        fake = FakeServer()

        async def answer(request: Any, context: Any) -> Any:
            response = await fake.good(request, context)
            match change:
                case "id":
                    response.id = "another"
                case "version":
                    response.model_version = "latest"
                case "shape":
                    response.outputs[0].shape[:] = [1, 4, 3]
                case "dtype":
                    response.outputs[0].datatype, response.raw_output_contents[0] = "FP32", bytes(4 * SMALL.size)
                case "missing":
                    response.outputs[0].name = "something"
                case "short":
                    response.raw_output_contents[0] = b"garbage"
            return response

        fake.answer = answer
        async with fake.listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", SMALL))
            (result,) = await rest(stream)
            assert result.status == "failed" and type(result.error) is ServerFailedError
            assert "same version of phaseline" in str(result.error)

    run(scenario())


def test_late_tells_the_last_reason() -> None:
    async def scenario() -> None:
        fake = FakeServer()
        fake.answer = failing(1000, UNAVAILABLE, "back soon")
        async with fake.listening() as address, FrameStream(address, "cells", deadline_s=0.5) as stream:
            await stream.send(Frame("a", SMALL))
            (result,) = await rest(stream)
            assert result.status == "late" and type(result.error) is ServerTimeoutError and "back soon" in str(result.error)
            assert 1 < fake.asked["a"] < 20 and result.seconds >= 0.5 and stream.counts == Counts(sent=1, late=1)

    run(scenario())


def test_the_servers_queue_knows_what_is_left_of_the_deadline() -> None:
    async def scenario() -> None:
        fake, limits = FakeServer(), []

        async def answer(request: Any, context: Any) -> Any:
            limits.append(request.parameters["timeout"].int64_param / 1e6)
            if len(limits) < 3:
                await context.abort(UNAVAILABLE, "try again")
            return await fake.good(request, context)

        fake.answer = answer
        async with fake.listening() as address, FrameStream(address, "cells", deadline_s=30, priority="batch") as stream:
            await stream.send(Frame("a", SMALL))
            assert [result.status for result in await rest(stream)] == ["done"]
        assert 30 >= limits[0] > limits[1] > limits[2] > 0

    run(scenario())


def test_a_stalled_network_makes_frames_late() -> None:
    async def scenario() -> None:
        async with (
            FakeServer().listening() as address, Proxy(address) as proxy,
            FrameStream(proxy.address, "cells", deadline_s=0.5) as stream,
        ):
            proxy.stall()
            await stream.send(Frame("a", SMALL))
            result = await next_result(stream)
            assert result.status == "late" and type(result.error) is ServerTimeoutError
            proxy.resume()
            await stream.send(Frame("b", SMALL))
            assert (await next_result(stream)).status == "done"

    run(scenario())


def test_a_connection_that_was_forgotten_is_replaced() -> None:
    async def scenario() -> None:
        async with (
            FakeServer().listening() as address, Proxy(address) as proxy,
            FrameStream(proxy.address, "cells", deadline_s=0.5) as stream,
        ):
            proxy.forget()
            await stream.send(Frame("a", SMALL))
            await stream.send(Frame("b", SMALL))
            assert [(await next_result(stream)).status for _ in range(2)] == ["late", "late"]
            await stream.send(Frame("c", SMALL))
            assert [result.status for result in await rest(stream)] == ["done"]
            assert proxy.accepted == 2

    run(scenario())


def test_frames_survive_a_cut_connection() -> None:
    async def scenario() -> None:
        fake, asked = FakeServer(), asyncio.Event()

        async def answer(request: Any, context: Any) -> Any:
            asked.set()
            await asyncio.sleep(60 if proxy.accepted == 1 else 0)
            return await fake.good(request, context)

        fake.answer = answer
        async with (
            fake.listening() as address, Proxy(address) as proxy,
            FrameStream(proxy.address, "cells", deadline_s=30) as stream,
        ):
            await stream.send(Frame("a", SMALL))
            await asked.wait()
            proxy.cut()
            (result,) = await rest(stream)
            assert result.status == "done" and fake.asked["a"] >= 2 and proxy.accepted >= 2

    run(scenario())


def test_several_servers_share_the_frames() -> None:
    async def scenario() -> None:
        one, two = FakeServer(), FakeServer()
        let_go = asyncio.Event()

        async def answer(request: Any, context: Any) -> Any:
            await let_go.wait()
            return await FakeServer.good(request, context)

        one.answer = two.answer = answer
        async with one.listening() as first, two.listening() as second, FrameStream(f"{first},{second}", "cells") as stream:
            for i in range(8):
                await stream.send(Frame(str(i), SMALL))
            while len(one.asked) + len(two.asked) < 8:
                await asyncio.sleep(0.01)
            assert len(one.asked) == len(two.asked) == 4
            let_go.set()
            assert len(await rest(stream)) == 8

    run(scenario())


def test_a_server_that_fails_is_left_out_and_comes_back() -> None:
    async def scenario() -> None:
        good, bad = FakeServer(), FakeServer()
        bad.answer = failing(1, UNAVAILABLE, "starting")
        async with (
            good.listening() as first, bad.listening() as second,
            FrameStream(f"{second},{first}", "cells", in_flight=2, deadline_s=30) as stream,
        ):
            i = 0
            while bad.asked.get("last", 0) == 0:
                await stream.send(Frame(str(i), SMALL))
                assert (await next_result(stream)).status == "done"
                i += 1
                if sum(bad.asked.values()) >= 2:
                    break
                await asyncio.sleep(0.01)
            assert good.asked

    run(scenario())


def test_one_server_is_enough_to_open() -> None:
    async def scenario() -> None:
        async with (
            FakeServer().listening() as address, Proxy("127.0.0.1:9") as nowhere,
            FrameStream(f"{nowhere.address},{address}", "cells", in_flight=4) as stream,
        ):
            for i in range(4):
                await stream.send(Frame(str(i), SMALL))
            assert [result.status for result in await rest(stream)] == ["done"] * 4

    run(scenario())


def test_servers_with_different_recipes_are_refused() -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as one, FakeServer(recipe_hash="b" * 64).listening() as two:
            with pytest.raises(ServerRefusedError, match="publish the same to all"):
                async with FrameStream(f"{one},{two}", "cells"):
                    pass

    run(scenario())


@pytest.mark.parametrize("how", ["another version", "a replaced server"])
def test_labels_of_another_recipe_are_not_given(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Found out by the version that answered, or, since each server counts for itself, after a silence."""

    async def scenario() -> None:
        fake = FakeServer()

        async def answer(request: Any, context: Any) -> Any:
            response = await fake.good(request, context)
            response.model_version = str(json.loads(fake.parameters["recipe"])["version"])
            return response

        fake.answer = answer
        async with fake.listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", SMALL))
            first = await next_result(stream)
            assert (first.status, first.version, first.recipe_hash) == ("done", 3, "a" * 64)
            recipe = json.loads(fake.parameters["recipe"])
            fake.parameters["recipe"] = json.dumps(recipe | {"version": 4})
            await stream.send(Frame("b", SMALL))
            again = await next_result(stream)
            assert (again.status, again.version, again.recipe_hash) == ("done", 4, "a" * 64) and fake.asked["b"] == 2
            version = 5 if how == "another version" else 4
            fake.parameters["recipe"] = json.dumps(recipe | {"version": version, "hash": "b" * 64})
            if how == "a replaced server":
                monkeypatch.setattr(stream_servers, "FRESH_S", 0.0)
            for frame_id in ("c", "d"):
                await stream.send(Frame(frame_id, SMALL))
                other = await next_result(stream)
                assert other.status == "failed" and type(other.error) is ServerRefusedError and other.labels is None
                assert "another was published" in str(other.error) and "open the stream again" in str(other.error)

    run(scenario())


def test_a_late_frame_does_not_leave_its_server_out() -> None:
    async def scenario() -> None:
        fake = FakeServer()

        async def answer(request: Any, context: Any) -> Any:
            await asyncio.sleep(60 if request.id == "slow" else 0.01)
            return await fake.good(request, context)

        fake.answer = answer
        async with (
            fake.listening() as address, Proxy(address) as proxy,
            FrameStream(proxy.address, "cells", deadline_s=0.5, ordered=False) as stream,
        ):
            await stream.send(Frame("slow", SMALL))
            status, number = "done", 0
            while status == "done":
                await stream.send(Frame(str(number), SMALL))
                status, number = (await next_result(stream)).status, number + 1
            assert status == "late"
            stream.offer(Frame("after", SMALL))
            assert "after" in [result.id for result in await rest(stream) if result.status == "done"]
            # Neither a pause, after which the recipe would be read again, nor a new connection.
            assert proxy.accepted == 1 and fake.described == 1

    run(scenario())


def test_what_nobody_expected_is_a_failed_frame(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as address, FrameStream(address, "cells") as stream:
            with monkeypatch.context() as patched:
                patched.setattr(FrameStream, "_arrays", lambda *_: 1 / 0)
                await stream.send(Frame("a", SMALL))
                result = await next_result(stream)
            assert result.status == "failed" and type(result.error) is ServerFailedError
            assert "ZeroDivisionError" in str(result.error) and "'a' failed unexpectedly" in caplog.text
            await stream.send(Frame("b", SMALL))
            assert [result.status for result in await rest(stream)] == ["done"]
            assert stream.counts == Counts(sent=2, done=1, failed=1)

    run(scenario())


def test_waiting_for_a_result_can_be_given_up_and_repeated() -> None:
    async def scenario() -> None:
        fake, let_go = FakeServer(), asyncio.Event()

        async def answer(request: Any, context: Any) -> Any:
            await let_go.wait()
            return await fake.good(request, context)

        fake.answer = answer
        async with fake.listening() as address, FrameStream(address, "cells", deadline_s=30) as stream:
            await stream.send(Frame("a", SMALL))
            stream.end_input()
            results = stream.results()
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(results), 0.05)
            let_go.set()
            assert [result.id async for result in results] == ["a"]

    run(scenario())


def test_opening_waits_for_a_server_that_starts() -> None:
    async def scenario() -> None:
        fake = FakeServer()
        fake.starts = 2
        async with fake.listening() as address, FrameStream(address, "cells", deadline_s=30) as stream:
            assert stream.recipe.version == 3 and fake.starts == 0

    run(scenario())


def test_opening_fails_clearly() -> None:
    async def scenario() -> None:
        async with Proxy("127.0.0.1:9") as nowhere:
            with pytest.raises(ServerUnavailableError, match=nowhere.address):
                async with FrameStream(nowhere.address, "cells", deadline_s=0.3):
                    pass
        fake = FakeServer()
        async with fake.listening() as address:
            with pytest.raises(UnknownModelError, match="segment_plants"):
                async with FrameStream(address, "plants", deadline_s=0.3):
                    pass
            fake.parameters["recipe"] = "{}"
            with pytest.raises(ServerRefusedError, match="cannot be understood"):
                async with FrameStream(address, "cells"):
                    pass
            fake.parameters.clear()
            with pytest.raises(ServerRefusedError, match="is this a phaseline server"):
                async with FrameStream(address, "cells"):
                    pass

    run(scenario())


@pytest.mark.parametrize(("channels", "kind", "image", "words"), [
    (1, None, np.zeros((3, 4), np.int16), "int16 came, expected an array of uint8"),
    (1, None, [[1, 2]], "list came"),
    (1, "uint16", SMALL, "fitted on uint16 images"),
    (1, "float", SMALL, "fitted on float images"),
    (1, None, np.zeros((3, 4, 3), np.uint8), "fitted on grey images"),
    (3, None, SMALL, "fitted on RGB images"),
    (1, None, np.zeros((0, 4), np.uint8), r"shape \(0, 4\) came"),
    (1, None, np.zeros(4, np.uint8), r"shape \(4,\) came"),
    (1, None, np.zeros((2, 2, 3, 4), np.uint8), r"expected \(rows, cols\) or \(planes, rows, cols\)"),
    (1, None, np.zeros((65, 2, 2), np.uint8), "at most 64 planes"),
    (1, None, np.zeros((40, 40), np.uint8), "1000 pixels"),
    (1, None, np.full((2, 2), np.nan, np.float32), "NaN or infinite"),
])
def test_images_that_are_refused(channels: int, kind: str | None, image: Any, words: str) -> None:
    async def scenario() -> None:
        async with FakeServer(channels, kind).listening() as address, FrameStream(address, "cells") as stream:
            with pytest.raises(ImageError, match=words):
                stream.offer(Frame("a", image))
            with pytest.raises(ImageError, match=words):
                await stream.send(Frame("a", image))
            assert stream.counts == Counts()

    run(scenario())


def test_rgb_frames() -> None:
    async def scenario() -> None:
        async with FakeServer(3).listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", np.zeros((3, 4, 3), np.uint8)))
            await stream.send(Frame("b", np.zeros((2, 3, 4, 3), np.uint8)))
            shapes = [result.labels.shape for result in await rest(stream) if result.labels is not None]
            assert shapes == [(3, 4), (2, 3, 4)]

    run(scenario())


def test_ids() -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as address, FrameStream(address, "cells") as stream:
            await stream.send(Frame("a", SMALL))
            with pytest.raises(UsageError, match="'a' came while another of this id waits"):
                stream.offer(Frame("a", SMALL))
            with pytest.raises(UsageError, match="'a' came while another"):
                await stream.send(Frame("a", SMALL))
            assert stream.counts.sent == 1
            await next_result(stream)
            await stream.send(Frame("a", SMALL))
            assert [result.status for result in await rest(stream)] == ["done"]

    run(scenario())
    with pytest.raises(UsageError, match="a frame's id is ''"):
        Frame("", SMALL)
    with pytest.raises(UsageError, match=r"'\\udcff', which UTF-8 cannot hold"):
        Frame("\udcff", SMALL)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"servers": "nowhere"}, "expected HOST:PORT"),
    ({"recipe": "No Name"}, "cannot be served"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"deadline_s": 0.0}, "deadline_s is 0"),
    ({"deadline_s": float("nan")}, "deadline_s is nan"),
    ({"priority": "urgent"}, "priority is 'urgent'"),
])
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FrameStream(**{"servers": "127.0.0.1:8001", "recipe": "cells", **arguments})


def test_a_stream_is_used_inside_with_and_once() -> None:
    async def scenario() -> None:
        async with FakeServer().listening() as address:
            stream = FrameStream(address, "cells")
            with pytest.raises(UsageError, match="inside `async with`"):
                stream.offer(Frame("a", SMALL))
            async with stream:
                pass
            with pytest.raises(UsageError, match="opened once"):
                async with stream:
                    pass

    run(scenario())


def test_leaving_the_block_cancels_what_waits() -> None:
    async def scenario() -> None:
        fake = FakeServer()
        fake.answer = silent
        async with fake.listening() as address:
            stream = FrameStream(address, "cells", in_flight=1, deadline_s=60)
            with pytest.raises(ZeroDivisionError):
                async with stream:
                    await stream.send(Frame("a", SMALL))
                    sender = asyncio.create_task(stream.send(Frame("b", SMALL)))
                    reader = asyncio.create_task(rest(stream))
                    await asyncio.sleep(0.05)
                    raise ZeroDivisionError
            with pytest.raises(UsageError, match="'b' came after the end"):
                await sender
            assert await reader == []
            assert stream.counts == Counts(sent=1, waiting=1)

    run(scenario())


def beamline() -> Any:
    """The example as a module."""
    path = Path(__file__).parents[1] / "docs" / "examples" / "beamline.py"
    spec = importlib.util.spec_from_file_location("beamline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bigtiff", [False, True])
def test_the_example_refuses_a_scan_that_was_cut_short(tmp_path: Path, bigtiff: bool) -> None:
    scan, cut = tmp_path / "scan.tif", tmp_path / "cut.tif"
    with tifffile.TiffWriter(scan, bigtiff=bigtiff) as writer:
        for number in range(5):
            writer.write(np.full((40, 50), number, np.uint16), photometric="minisblack", contiguous=False)
    assert [read()[0, 0] for _, read in beamline().frames_of(scan)] == list(range(5))
    cut.write_bytes(scan.read_bytes()[:10_000])
    with pytest.raises(ImageError, match=r"cut.tif is truncated: after \d pages another one should follow"):
        next(beamline().frames_of(cut))


def test_the_example_refuses_two_images_of_one_name(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy", "a.png"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"holds both a\.npy and a\.png, .*rename one"):
        next(beamline().frames_of(tmp_path))


def test_the_example_goes_on_with_the_same_recipe_only(tmp_path: Path) -> None:
    path, ledger = tmp_path / "ledger.jsonl", beamline().Ledger
    path.write_text('{"recipe": "aa')  # A kill cut the first line short: nothing was begun.
    with contextlib.closing(ledger(path, "a" * 64)) as begun:
        begun.add("one", "done")
        begun.add("two", "late")
    with contextlib.closing(ledger(path, "a" * 64)) as again:
        assert again.done == {"one"}
    with pytest.raises(UsageError, match=r"begun with recipe aaaaaaaaaaaa, but the servers have bbbbbbbbbbbb .*another folder"):
        ledger(path, "b" * 64)
    path.write_text('{"id": "one", "status": "done"}\n')
    with pytest.raises(UsageError, match="begun with recipe unknown"):
        ledger(path, "a" * 64)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["deep", "classical"])
def test_labels_are_those_of_the_embedded_segmenter(server: TritonServer, recipes: dict[str, Path], name: str) -> None:
    pictures = {f"frame-{seed}": picture(seed, 60 + seed, 70) for seed in range(4)}

    async def scenario() -> None:
        async with (
            FrameStream(server.address, name, confidence=True, deadline_s=60, in_flight=3) as stream,
            asyncio.TaskGroup() as group,
        ):

            async def feed() -> None:
                for frame_id, image in pictures.items():
                    await stream.send(Frame(frame_id, image))
                await stream.send(Frame("stack", np.stack([picture(8), picture(9)])))
                stream.end_input()

            group.create_task(feed())
            results = [result async for result in stream.results()]
        assert [result.id for result in results] == [*pictures, "stack"]
        with Segmenter.open(recipes[name], threads=2) as segmenter:
            for result, image in zip(results, pictures.values(), strict=False):
                expected = segmenter.segment(image)
                assert result.status == "done" and result.version == 1
                assert result.labels is not None and result.labels.dtype == expected.labels.dtype
                assert np.array_equal(result.labels, expected.labels) and np.array_equal(result.confidence, expected.confidence)
            planes = np.stack([segmenter.segment(picture(seed)).labels for seed in (8, 9)])
            assert np.array_equal(results[-1].labels, planes)

    run(scenario())


@pytest.mark.triton
def test_triton_through_a_cut_and_a_stall(server: TritonServer, recipes: dict[str, Path]) -> None:
    async def scenario() -> None:
        async with Proxy(server.address) as proxy, FrameStream(proxy.address, "classical", deadline_s=60) as stream:
            await stream.send(Frame("a", picture(1)))
            proxy.cut()
            await stream.send(Frame("b", picture(2)))
            proxy.stall()
            await stream.send(Frame("c", picture(3)))
            await asyncio.sleep(0.1)
            proxy.resume()
            results = await rest(stream)
        with Segmenter.open(recipes["classical"], threads=2) as segmenter:
            for seed, result in enumerate(results, 1):
                assert result.status == "done" and np.array_equal(result.labels, segmenter.segment(picture(seed)).labels)

    run(scenario())


@pytest.mark.triton
def test_triton_does_not_know_the_recipe(server: TritonServer) -> None:
    async def scenario() -> None:
        with pytest.raises(UnknownModelError, match="segment_nothing"):
            async with FrameStream(server.address, "nothing", deadline_s=0.3):
                pass

    run(scenario())
