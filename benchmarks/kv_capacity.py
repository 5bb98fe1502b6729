"""How many tokens a cache takes in, against float16 in the same memory:  python -m benchmarks.kv_capacity [--help]

For each model, context and policy: sequences of that context are submitted to the scheduler over the plan that
`resolve` makes of the memory, and those that run together to their end without preemption are counted. So all is in it:
parameters of groups, windows, sinks, the rows of a step, pages that are not full. Two plans are shown. `default` has 64
seats and knows nothing of the context; `seats` has as many seats as sequences of that context fit, which is how many
windows are provided for. No tensors are made.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shapes import SHAPES
from engine.assembly import make_manager
from engine.config import ConfigError, EngineConfig, ModelFacts, Plan, resolve
from engine.messages import Sampling, Submit
from engine.request import Request
from engine.request import Sequence as Choice
from engine.scheduler import Scheduler
from kvcache.layout import PageLayout
from kvcache.policy import PolicyError, read_policy

MODELS = ("llama-3.2-1b", "llama-3-8b")
NUM_F16 = 16  # sequences that the memory holds in float16
CONTEXTS = (4096, 8192, 32768)  # tokens of one sequence
POLICIES = ("k8v8", "k4v4", "k4v4:w64", "skvq:k4v2", "skvq:k2v2", "skvq:k2v2:w64")
COLUMNS = ("model", "context", "policy", "plan", "seats", "tokens", "ratio")
PAGE_SIZE = 64
PLENTY = 1 << 50  # bytes: the machine is no limit here
DEFAULT_SEATS = 64


@dataclass(frozen=True)
class Case:
    """One cache and the sequences that come."""

    model: str
    policy: str
    context: int  # tokens
    num_bytes: int

    @property
    def layout(self) -> PageLayout:
        shape = SHAPES[self.model]
        return PageLayout(read_policy(self.policy), shape.num_layers, shape.num_kv_heads, shape.head_dim, PAGE_SIZE)

    def plan(self, num_seats: int) -> Plan:
        """Raises ConfigError when not even a page fits."""
        layout = self.layout
        most = 0 if layout.read_rule is None else layout.read_rule.max_pages
        facts = ModelFacts(
            max_position=self.context,
            kv_bytes_per_token=-(-layout.bytes_per_page // PAGE_SIZE),
            weight_bytes=0,
            free_memory=PLENTY,
            num_cores=1,
            has_cuda=False,
            bytes_per_recent_page=layout.bytes_per_recent_page,
            recent_pages_per_sequence=most,
        )
        wishes = EngineConfig("", kv_policy=self.policy, kv_memory=self.num_bytes, max_num_seqs=num_seats)
        return resolve(wishes, facts)

    def best_plan(self) -> Plan:
        """The one with the most seats for each of which there are pages."""
        per_sequence = -(-self.context // PAGE_SIZE)
        plans = [self.plan(1)]
        while plans[-1].num_pages >= (plans[-1].max_num_seqs + 1) * per_sequence:
            plans.append(self.plan(plans[-1].max_num_seqs + 1))
            if plans[-1].num_pages < plans[-1].max_num_seqs * per_sequence:
                return plans[-2]
        return plans[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=MODELS, metavar="MODEL")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of one sequence")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="of the KV cache")
    args = parser.parse_args()
    try:
        for policy in args.policies:
            read_policy(policy)
    except PolicyError as error:
        parser.error(f"--policies: {error}")
    rows = [row for model in args.models for context in args.contexts for row in compare(model, context, args.policies)]
    print(json.dumps({"benchmark": "kv_capacity", "rows": rows}))


def compare(model: str, context: int, policies: Sequence[str] = POLICIES) -> list[dict[str, object]]:
    """Each policy with either plan against float16 that lost no byte."""
    rows: list[dict[str, object]] = []
    of_f16 = NUM_F16 * context
    num_bytes = of_f16 * Case(model, "f16", context, 0).layout.bytes_per_token
    for policy in policies:
        case = Case(model, policy, context, num_bytes)
        for name, plan in (("default", case.plan(DEFAULT_SEATS)), ("seats", case.best_plan())):
            tokens = admitted(case, plan)
            ratio = round(tokens / of_f16, 2)
            facts = (model, context, policy, name, plan.max_num_seqs, tokens, ratio)
            rows.append(dict(zip(COLUMNS, facts, strict=True)))
            print(*facts, sep="  ", flush=True)
    return rows


def admitted(case: Case, plan: Plan) -> int:
    """Tokens of the sequences of `case.context` tokens that run together until one has all its tokens stored."""
    manager = make_manager(plan, case.layout, "capacity")
    scheduler = Scheduler(manager, plan.max_num_seqs, plan.max_batch_tokens)
    num_fit = plan.num_pages * plan.page_size // case.context
    for i in range(min(num_fit, plan.max_num_seqs) + 1):
        prompt = [i] * (case.context - 1)
        scheduler.add(Choice(i, Request(Submit(str(i), prompt, Sampling(2), 0.0), i, 0), 0, prompt))
    while any(s.num_uncomputed for s in scheduler.sequences()[: scheduler.num_running]) or not scheduler.num_running:
        slices = scheduler.schedule()
        if not slices:
            break
        for item in slices:
            item.sequence.num_computed = item.start + item.num_tokens
            manager.commit(item.sequence.id, item.sequence.tokens, item.sequence.num_computed)
    if scheduler.num_preemptions:
        raise ConfigError("more sequences were admitted than fit")
    return scheduler.num_running * case.context


if __name__ == "__main__":
    main()
