"""Turns the metrics of docs/monitoring.md into panels: a title, a unit, what it tells, and queries of Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

# Grafana's own, for what it draws: at least four scrapes.
WINDOW = "$__rate_interval"
# TorchServe writes its own labels in small letters.
OURS, THEIRS = '{ModelName=~"$model"}', '{model_name=~"$model"}'
FAILED = '{ModelName=~"$model", Status=~"5.."}'


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: What is on its y axis.
        unit: In Grafana's words: reqps, s, percentunit, none, short.
        tells: Shown beside the title.
        queries: Legend, with labels in double braces -> PromQL.
        most: Upper end of the y axis; by default as the values are.
    """

    title: str
    unit: str
    tells: str
    queries: dict[str, str]
    most: float | None = None


def rate(metric: str, *by: str, window: str = WINDOW, labels: str = OURS) -> str:
    """How often a second, summed over all but some labels."""
    return f"sum by ({', '.join(by)}) (rate({metric}{labels}[{window}]))"


def mean(metric: str, window: str = WINDOW) -> str:
    """The mean of a histogram's values, by model."""
    return f"{rate(f'{metric}_sum', 'ModelName', window=window)} / {answers_rate(metric, window)}"


def answers_rate(metric: str = "EnsembleMutualInformation", window: str = WINDOW) -> str:
    """How many values a histogram got a second, by model: of mutual information, one for each item answered."""
    return rate(f"{metric}_count", "ModelName", window=window)


def quantile(metric: str, share: float) -> str:
    """What that share of a histogram's values is below, as near as its buckets are."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'ModelName', 'le')})"


def member_share(metric: str, window: str = WINDOW) -> str:
    """The share of answers that a counter of members concerns, by model and member."""
    counted = rate(metric, "ModelName", "Member", window=window)
    return f"{counted} / on (ModelName) group_left {answers_rate(window=window)}"


def mean_of_requests(counter: str) -> str:
    """Seconds of TorchServe's own, which counts microseconds over all requests."""
    requests = rate("ts_inference_requests_total", "model_name", labels=THEIRS)
    return f"{rate(counter, 'model_name', labels=THEIRS)} / {requests} / 1e6"


MEMBER, MODEL = "{{ModelName}} {{Member}}", "{{ModelName}}"
ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel(
            "Requests",
            "reqps",
            "Predictions and explanations that TorchServe took, answered or refused.",
            {"{{model_name}}": rate("ts_inference_requests_total", "model_name", labels=THEIRS)},
        ),
        Panel(
            "Refused, by status",
            "reqps",
            "400 to 422 are the clients'; 500 and 507 are the server's.",
            {"{{Status}} {{Reason}}": rate("EnsembleRefusedRequests", "Status", "Reason")},
        ),
        Panel(
            "HTTP answers, by class of status",
            "reqps",
            "Of the whole server: the management address and 503s of a full queue as well.",
            {f"{number}XX": rate(f"Requests{number}XX", "instance", labels="") for number in "245"},
        ),
        Panel(
            "Failed",
            "percentunit",
            "Share of the requests that the server failed to answer.",
            {
                "failed": f"{rate('EnsembleRefusedRequests', labels=FAILED)}"
                f" / {rate('ts_inference_requests_total', labels=THEIRS)}"
            },
        ),
        Panel(
            "Items in a forward",
            "short",
            "Requests that wait for each other share one; buckets end at 10, the mean is exact.",
            {
                f"mean {MODEL}": mean("EnsembleBatchSize"),
                f"90 % below {MODEL}": quantile("EnsembleBatchSize", 0.9),
            },
        ),
        Panel(
            "Answers that named a member",
            "reqps",
            "Requests with `subset`: a tenant's, where members are tenants'.",
            {MEMBER: rate("EnsembleMemberAnswers", "ModelName", "Member")},
        ),
    ),
    "Time": (
        Panel(
            "Seconds by phase, mean",
            "s",
            "Queue: of a request, the wait for others included. The rest: of a batch.",
            {
                "queue {{model_name}}": mean_of_requests("ts_queue_latency_microseconds"),
                **{
                    f"{phase.lower()} {MODEL}": mean(f"Ensemble{phase}Time")
                    for phase in ("Parse", "Forward", "Respond")
                },
            },
        ),
        Panel(
            "Seconds of a request, mean",
            "s",
            "From TorchServe's frontend on, without the network.",
            {"{{model_name}}": mean_of_requests("ts_inference_latency_microseconds")},
        ),
        Panel(
            "Seconds of a forward",
            "s",
            "As near as TorchServe's buckets are: 5 ms to 10 s.",
            {
                f"{100 * share:g} % below {MODEL}": quantile("EnsembleForwardTime", share)
                for share in (0.5, 0.9, 0.99)
            },
        ),
    ),
    "Members": (
        Panel(
            "Agreement per member",
            "percentunit",
            "Share of classifications in which the member alone would have said the same.",
            {MEMBER: f"1 - {member_share('EnsembleDissentingMembers')}"},
            most=1,
        ),
        Panel(
            "Drift per member",
            "percentunit",
            "Dissent of the last hour less that of the last day: above 0 a member leaves the others.",
            {
                MEMBER: f"{member_share('EnsembleDissentingMembers', '1h')}"
                f" - {member_share('EnsembleDissentingMembers', '1d')}"
            },
        ),
        Panel(
            "Answers without a member",
            "percentunit",
            "Its output was not finite, so it had no weight.",
            {MEMBER: member_share("EnsembleNonFiniteMembers")},
        ),
    ),
    "Uncertainty": (
        Panel(
            "Mutual information, nats",
            "short",
            "What the members disagree about. It rises where inputs are unlike those that they learnt from.",
            {
                f"mean {MODEL}": mean("EnsembleMutualInformation"),
                f"90 % below {MODEL}": quantile("EnsembleMutualInformation", 0.9),
            },
        ),
        Panel(
            "Drift of the inputs",
            "short",
            "Mean mutual information of the last hour over that of the last day: 1 where nothing has changed.",
            {MODEL: f"({mean('EnsembleMutualInformation', '1h')}) / ({mean('EnsembleMutualInformation', '1d')})"},
        ),
        Panel(
            "Abstentions",
            "percentunit",
            "Share of answers beyond the limits of setup_config.json.",
            {MODEL: f"{rate('EnsembleAbstentions', 'ModelName')} / {answers_rate()}"},
        ),
    ),
    "Machine": (
        Panel(
            "Slower ways taken, since the start",
            "short",
            "Packed code that was refused, rows that run alone, batches that failed and were run one by one.",
            {"{{ModelName}} {{Reason}}": f"sum by (ModelName, Reason) (EnsembleFallbacks{OURS})"},
        ),
        Panel("CPU", "percent", "Of the machine.", {"{{instance}}": "max by (instance) (CPUUtilization)"}, most=100),
        Panel(
            "Memory",
            "percent",
            "Of the machine.",
            {"{{instance}}": "max by (instance) (MemoryUtilization)"},
            most=100,
        ),
    ),
}
