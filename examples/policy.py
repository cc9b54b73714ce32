"""Train a diffusion policy (arXiv:2303.04137) on a toy navigation task, run it closed-loop and time it, in a minute.

    python examples/policy.py --plot trajectories.png

A point robot drives from the bottom of the field to a goal at the top; a round obstacle is in the way, and half of the
demonstrations pass it on the left, half on the right. A policy that averages them drives into the obstacle. Each
control tick samples a chunk of 16 velocities with 10 DDIM steps and executes the first 8.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn import functional

from fastddim import DDIMConfig, Sampler, Schedule
from fastddim.files import check_writable, write_whole
from fastddim.models.policy import ActionUNet1d

RADIUS = 0.3  # of the obstacle, at the origin
CLEARANCE = 0.2  # that the demonstrations keep from it
SPEED = 0.05  # distance per action of length 1
HORIZON = 16
EXECUTED = 8
DEMO_TICKS = 48
EPISODE_TICKS = 80
REACHED = 0.1  # from the goal
NUM_STEPS = 10
ROUNDS = 200  # timed calls of each candidate, the first tenth to warm up
SUCCESS_BAR = 0.9
EMA_DECAY = 0.995
# As the paper's configurations have it: diffusers' DDIM with a squared cosine, 100 timesteps, and a clip.
CONFIG = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


def draw_tasks(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts `[count, 2]` at the bottom of the field and goals `[count, 2]` at its top."""
    x = torch.rand(count, 2, generator=generator) - 0.5
    ones = torch.ones(count)
    return torch.stack([0.6 * x[:, 0], -ones], 1), torch.stack([x[:, 1], ones], 1)


def expert_action(position: torch.Tensor, goal: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The demonstrator's velocity `[B, 2]`, at most 1 long: to the goal if the way is clear, else along a tangent.

    `side` `[B]` is -1 to pass the obstacle on the left, 1 on the right.
    """
    to_goal = goal - position
    along = (-(position * to_goal).sum(1) / to_goal.square().sum(1).clamp(min=1e-9)).clamp(0, 1)
    nearest = (position + along[:, None] * to_goal).norm(dim=1)
    distance = position.norm(dim=1)
    angle = side * torch.asin(((RADIUS + CLEARANCE) / distance).clamp(max=1.0))
    to_centre = -position / distance[:, None]
    cos, sin = angle.cos(), angle.sin()
    tangent = torch.stack(
        [cos * to_centre[:, 0] - sin * to_centre[:, 1], sin * to_centre[:, 0] + cos * to_centre[:, 1]], 1
    )
    straight = to_goal / to_goal.norm(dim=1, keepdim=True).clamp(min=SPEED)
    # On the tangent's circle the way counts as clear, and beyond the obstacle, whatever the distance.
    blocked = (nearest < 0.99 * (RADIUS + CLEARANCE)) & (along > 0)
    return torch.where(blocked[:, None], tangent, straight)


def demonstrations(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations `[N, 4]` (position, goal) and the expert's chunks `[N, HORIZON, 2]` from there, for training.

    The motion is noisy and the chunks are not, so that they show how to correct a deviation.
    """
    position, goal = draw_tasks(count, generator)
    side = torch.arange(count) % 2 * 2.0 - 1
    observations, chunks = [], []
    for _ in range(DEMO_TICKS):
        planned, actions = position, []
        for _ in range(HORIZON):
            actions.append(expert_action(planned, goal, side))
            planned = planned + SPEED * actions[-1]
        observations.append(torch.cat([position, goal], 1))
        chunks.append(torch.stack(actions, 1))
        position = position + SPEED * (actions[0] + 0.3 * torch.randn(count, 2, generator=generator))
    return torch.cat(observations), torch.cat(chunks)


def train(num_steps: int, batch_size: int, generator: torch.Generator) -> ActionUNet1d:
    """Train to predict the noise in chunks of demonstrations; returns the exponential moving average."""
    observations, chunks = demonstrations(400, generator)
    alphas_cumprod = torch.tensor(Schedule(DDIMConfig(**CONFIG)).alphas_cumprod, dtype=torch.float32)
    model = ActionUNet1d(action_dim=2, obs_dim=4, channels=(32, 64), horizon=HORIZON)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    average = math.nan
    for step in range(num_steps):
        index = torch.randint(len(chunks), (batch_size,), generator=generator)
        t = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator)
        alpha_bar = alphas_cumprod[t, None, None]
        noise = torch.randn(batch_size, HORIZON, 2, generator=generator)
        x_t = alpha_bar.sqrt() * chunks[index] + (1 - alpha_bar).sqrt() * noise
        loss = functional.mse_loss(model(x_t, t, observation=observations[index]), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cosine.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 250 == 0 or step == num_steps - 1:
            print(f"step {step}: loss {average:.4f}", flush=True)
    return ema


def run_episodes(
    sampler: Sampler, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drive `count` robots, all in one batch: a sample is the one that its seed gives alone.

    Returns:
        Trajectories `[EPISODE_TICKS + 1, count, 2]`, goals `[count, 2]`, and whether each one reached its goal and never
        touched the obstacle `[count]`.
    """
    position, goal = draw_tasks(count, generator)
    path = [position]
    while len(path) <= EPISODE_TICKS:
        # Every chunk of every episode has its own seed.
        chunk = sampler(count, seeds=len(path) * count, observation=torch.cat([position, goal], 1))
        assert isinstance(chunk, torch.Tensor)
        for action in chunk[:, :EXECUTED].unbind(1):
            position = position + SPEED * action
            path.append(position)
    paths = torch.stack(path)
    reached = (paths[-1] - goal).norm(dim=1) < REACHED
    return paths, goal, reached & (paths.norm(dim=2) > RADIUS).all(0)


def pass_left(paths: torch.Tensor) -> torch.Tensor:
    """Whether each trajectory `[T, B, 2]` crosses the obstacle's height on its left: `[B]`."""
    crossing = (paths[:, :, 1] >= 0).int().argmax(0)
    return paths[crossing, torch.arange(paths.shape[1]), 0] < 0


def diffusers_sample(model: ActionUNet1d) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same sampling with diffusers' scheduler in a Python loop: a function of the start and the observation."""
    scheduler = diffusers.DDIMScheduler(**CONFIG)
    scheduler.set_timesteps(NUM_STEPS)

    @torch.no_grad()
    def sample(x: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        for t in scheduler.timesteps:
            output = model(x, t.expand(x.shape[0]), observation=observation)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    return sample


def time_one_sample(model: ActionUNet1d, sampler: Sampler, rounds: int, generator: torch.Generator) -> None:
    """Print the latency of one chunk, the candidates taking turns."""
    observation = torch.tensor([[0.1, -1.0, 0.2, 1.0]])
    start = torch.randn(1, HORIZON, 2, generator=generator)
    baseline = diffusers_sample(model)
    ours = sampler(start, observation=observation)
    assert isinstance(ours, torch.Tensor)
    print(
        f"largest difference to diffusers' chunk from the same start: {(ours - baseline(start, observation)).abs().max():.1e}"
    )
    candidates: dict[str, Callable[[], object]] = {
        "fastddim.Sampler, start given": lambda: sampler(start, observation=observation),
        "fastddim.Sampler, start drawn from a seed": lambda: sampler(1, seeds=0, observation=observation),
        "diffusers.DDIMScheduler loop, start given": lambda: baseline(start, observation),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        warm = 1e3 * np.array(times[rounds // 10 :])
        p50, p99 = np.percentile(warm, (50, 99))
        print(f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms ({len(warm)} calls)")


def plot(path: Path, paths: torch.Tensor, goals: torch.Tensor, success: torch.Tensor) -> None:
    """Write a picture of the trajectories: left in blue, right in orange, failures in red."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(5, 6), layout="constrained")
    axes = figure.subplots()
    left = pass_left(paths)
    for k in range(paths.shape[1]):
        colour = ("tab:blue" if left[k] else "tab:orange") if success[k] else "tab:red"
        axes.plot(*paths[:, k].T, color=colour, linewidth=0.8, alpha=0.7)
    axes.plot(*goals.T, "k.", markersize=3)
    axes.add_patch(Circle((0, 0), RADIUS, color="0.6"))
    axes.set(aspect="equal", title=f"{len(success)} episodes, success {success.float().mean():.1%}")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120), "--plot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the trajectories as a PNG file")
    parser.add_argument("--quick", action="store_true", help="a few training steps and episodes: does everything work?")
    args = parser.parse_args()
    if args.plot is not None:
        check_writable(args.plot, "--plot")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib; run: pip install matplotlib")
    train_steps, episodes, rounds = (20, 8, 10) if args.quick else (args.train_steps, args.episodes, ROUNDS)

    # A second thread makes so small a model slower, and one gives the same sums on any machine.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = train(train_steps, 128, generator)
    # diffusers' default, with which the two latencies are of the same work.
    sampler = Sampler(
        model, DDIMConfig(**CONFIG), NUM_STEPS, sample_shape=model.sample_shape, use_clipped_model_output=False
    )
    paths, goals, success = run_episodes(sampler, episodes, generator)
    rate, left = float(success.float().mean()), float(pass_left(paths).float().mean())
    print(f"{episodes} episodes: success {rate:.1%}, pass left {left:.1%}, pass right {1 - left:.1%}")
    time_one_sample(model, sampler, rounds, generator)
    if args.plot is not None:
        plot(args.plot, paths, goals, success)
        print(f"wrote {args.plot}")
    if not args.quick and (rate < SUCCESS_BAR or not 0 < left < 1):
        raise SystemExit(f"success below {SUCCESS_BAR:.0%}, or one way only")


if __name__ == "__main__":
    main()
