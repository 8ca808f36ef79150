"""A stand-in for `spaces.GPU` on ZeroGPU: a process forked for each call; all that passes is pickled."""

import multiprocessing
import pickle

import torch


def gpu(duration):
    """As `spaces.GPU(duration=...)`, for generators."""

    def decorate(function):
        def call(*arguments):
            asked = duration(*arguments) if callable(duration) else duration
            assert 0 < asked <= 120
            here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
            sent = pickle.dumps(arguments)

            def work():
                here.close()
                torch.set_num_threads(1)  # a forked process has lost the threads of OpenMP
                for item in function(*pickle.loads(sent)):
                    there.send_bytes(pickle.dumps(item))
                there.send_bytes(b"")

            process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
            process.start()
            there.close()
            try:
                while True:
                    try:
                        data = here.recv_bytes()
                    except EOFError:
                        raise RuntimeError("GPU task aborted") from None
                    if not data:
                        return
                    yield pickle.loads(data)
            finally:
                here.close()
                process.join(20)
                assert process.exitcode is not None, "the process with the GPU goes on"

        return call

    return decorate
