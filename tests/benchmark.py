"""Times what a run runs, and projects the hours of a whole one. It takes the flags of jedi.py.

    python tests/benchmark.py                                    # the preset of this machine
    python tests/benchmark.py --preset paper --device cpu --no-compile
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jedi  # noqa: E402

SECONDS = 5  # of repetitions for each phase


def random_replay(args, num_actions, device):
    """Records 1,000 random frames in one episode."""
    rng = np.random.default_rng(0)
    replay = jedi.ReplayBuffer(args, device)
    shape = (3, args.image_size, args.image_size)
    replay.start_episode(rng.integers(0, 256, shape, dtype=np.uint8))
    for _ in range(min(1000, args.total_steps)):
        frame = rng.integers(0, 256, shape, dtype=np.uint8)
        replay.add(int(rng.integers(num_actions)), float(rng.integers(-1, 2)), False, frame)
    return replay


def phases(args, device):
    """Returns the three phases of jedi.main, as functions of one step or one update."""
    env = jedi.make_env(args.env_id, args.seed, args.image_size)
    num_actions = int(env.action_space.n)
    agent = jedi.Agent(args, num_actions).to(device)
    replay = random_replay(args, num_actions, device)
    wm_optimizer, ac_optimizer, wm_scheduler, ac_scheduler = jedi.make_optimizers(agent, args)
    wm_loss = jedi.world_model_loss
    ac_loss = jedi.actor_critic_loss
    step = jedi.imagine_step
    L = args.num_conditioning_steps
    H = args.horizon
    if args.compile and device.type == "cuda":
        torch.cuda.set_device(device)
        batch = replay.sample(replay.anchors(args.batch_size), L - 1, H)
        starts = replay.sample(replay.anchors(args.actor_critic_batch_size), L - 1, 0)
        wm_loss, ac_loss, step = jedi.compile_losses(agent, batch, starts)

    def collect():
        obs, _ = env.reset()
        act, _ = agent.act(obs)
        env.step(act)

    def world_model():
        torch.compiler.cudagraph_mark_step_begin()
        batch = replay.sample(replay.anchors(args.batch_size), L - 1, H)
        loss, _ = wm_loss(agent, batch)
        jedi.optimize(loss, wm_optimizer, wm_scheduler)

    def actor_critic():
        torch.compiler.cudagraph_mark_step_begin()
        batch = replay.sample(replay.anchors(args.actor_critic_batch_size), L - 1, 0)
        with torch.no_grad():
            z = agent.encoder(batch.obs)
        rollout = jedi.imagine(agent, z, batch.act, batch.real, H, step=step)
        loss, _ = ac_loss(agent, rollout)
        jedi.optimize(loss, ac_optimizer, ac_scheduler)

    return {"collect": collect, "world model": world_model, "actor-critic": actor_critic}


def measure(args, device, repetitions=None):
    """Prints and returns the median seconds of a step or an update of each phase."""
    medians = {}
    for name, phase in phases(args, device).items():
        for _ in range(5):  # compile, warm up, record CUDA graphs
            phase()
        seconds = []
        while len(seconds) < repetitions if repetitions else sum(seconds) < SECONDS:
            start = time.perf_counter()
            phase()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        medians[name] = float(np.median(seconds))
        print(f"{name:14}{1000 * medians[name]:10.1f} ms", flush=True)
    return medians


def hours_of_a_run(args, seconds):
    """Returns the hours of all steps and updates, without the games of the evaluation."""
    _, wm_updates, ac_updates = jedi.count_updates(args)
    total = args.total_steps * seconds["collect"]
    total += wm_updates * seconds["world model"]
    total += ac_updates * seconds["actor-critic"]
    return total / 3600


def main():
    args = jedi.parse_args()
    jedi.check_args(args)
    jedi.keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = True
    device = torch.zeros(1, device=args.device).device
    on_cuda = device.type == "cuda"
    name = f"{torch.get_num_threads()} CPU threads"
    mode = "eager"
    if on_cuda:
        name = torch.cuda.get_device_name(device)
        mode = "compiled" if args.compile else "eager"
    print(f"{name}, {mode}, torch {torch.__version__}")
    print(f"preset {args.preset}, batch {args.batch_size}", flush=True)
    seconds = measure(args, device)
    if on_cuda:
        print(f"peak memory   {torch.cuda.max_memory_reserved(device) / 2**30:10.1f} GiB")
    print(f"a whole run   {hours_of_a_run(args, seconds):10.1f} hours")


if __name__ == "__main__":
    main()
