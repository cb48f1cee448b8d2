#!/usr/bin/env python3
"""Writes the Grafana dashboards of the chart: build.py FOLDER. `make generate` calls it; edit here, never the JSON.

Labels: `namespace` and `name` are a service's, `pod` is the scraped pod. The chart's PodMonitors and
charts/ashlar/prometheus/scrape.yaml set them.
"""

import json
import pathlib
import sys

from grafana import dashboard, lines, number, query, row, table, variable

S = 'namespace=~"$namespace",name=~"$service"'
BY = "namespace, name"
NAMED = "{{namespace}}/{{name}}"
RATE = "$__rate_interval"


def rate(metric, by="", select=S):
    """Sum of per-second rates."""
    by = f" by ({by})" if by else ""
    return f"sum{by} (rate({metric}{{{select}}}[{RATE}]))"


def quantile(q, metric, by="", select=S):
    """A quantile of a histogram."""
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{{{select}}}[{RATE}])))"


def quantiles(metric, select=S):
    """Median, 95th and 99th percentile, as three lines."""
    return [query(quantile(q, metric, select=select), f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99)]


def mean(metric, by="", select=S):
    """Mean of a histogram's observations."""
    return f"{rate(metric + '_sum', by, select)} / {rate(metric + '_count', by, select)}"


def failed(by="", select=S):
    """Share of requests that ended with a 5xx; no requests, no figure."""
    bad = rate("ashlar_gateway_requests_total", by, select + ',code=~"5.."')
    everything = rate("ashlar_gateway_requests_total", by, select)
    return f"({bad} or 0 * {everything}) / {everything}"


def of(metric, how="sum", by=BY, select=S):
    """A gauge over pods, by service."""
    return f"{how} by ({by}) ({metric}{{{select}}})"


NAMESPACE = "label_values(ashlar_service_replicas_wanted, namespace)"
SERVICE = 'label_values(ashlar_service_replicas_wanted{namespace=~"$namespace"}, name)'
ALL = [variable("namespace", "Namespace", NAMESPACE, True), variable("service", "Service", SERVICE, True)]
ONE = [variable("namespace", "Namespace", NAMESPACE, False), variable("service", "Service", SERVICE, False)]


def fleet():
    panels = [
        number("Services", "InferenceServices that the operator knows.", f"count(max by ({BY}) (ashlar_service_replicas_wanted{{{S}}}))", "none"),
        number("Not ready", "Services whose condition Ready is not True.",
               f'count(max by ({BY}) (ashlar_service_condition{{{S},type="Ready",status!="True"}})) or vector(0)', "none", [1, 3]),
        number("Replicas missing", "Replicas wanted that do not answer yet.",
               f"sum(clamp_min({of('ashlar_service_replicas_wanted', 'max')} - {of('ashlar_service_replicas_ready', 'max')}, 0))", "none", [1, 5]),
        number("Requests", "Requests answered a second, through all gateways.", rate("ashlar_gateway_requests_total"), "reqps"),
        number("Failed", "Share of requests answered with a 5xx.", failed(), "percentunit", [0.001, 0.01], maximum=1),
        number("Generated tokens", "Tokens generated a second, over all model pods.", rate("vllm:generation_tokens_total"), "short"),
        row("What users see"),
        lines("Requests by service", "Answered a second.", [query(rate("ashlar_gateway_requests_total", BY), NAMED)], "reqps"),
        lines("Failed by service", "Share of requests answered with a 5xx.", [query(failed(BY), NAMED)], "percentunit", [0.001, 0.01]),
        lines("Time to first token, p95", "From arrival at the model pod to its first token.",
              [query(quantile(0.95, "vllm:time_to_first_token_seconds", BY), NAMED)], "s", [1, 2.5]),
        row("What it takes"),
        lines("Generated tokens by service", "Tokens a second.", [query(rate("vllm:generation_tokens_total", BY), NAMED)], "short"),
        lines("Replicas ready", "Pods that answer.", [query(of("ashlar_service_replicas_ready", "max"), NAMED)], "none", stack=True),
        lines("KV cache, fullest replica", "Share of blocks in use. Near 1 requests wait or are preempted.",
              [query(of("vllm:kv_cache_usage_perc", "max"), NAMED)], "percentunit", [0.8, 0.95], maximum=1),
        lines("Requests waiting", "Without a place at a replica, or held at the gateway.",
              [query(of("vllm:num_requests_waiting"), NAMED + " at replicas"), query(of("ashlar_gateway_held_requests"), NAMED + " held")], "none", [10, 100]),
        lines("Preemptions", "Running requests that lost their blocks, a second; their work is done again.",
              [query(rate("vllm:num_preemptions_total", BY), NAMED)], "ops", [0.1, 1]),
        lines("Models on their way", "Share of the model that is on disk.",
              [query(f"{of('ashlar_service_model_downloaded_bytes', 'max')} / {of('ashlar_service_model_bytes', 'max')}", NAMED)], "percentunit", maximum=1),
        row("What is wrong"),
        table("Conditions that are not True", "Type, reason and service; the runbooks and the troubleshooting page go by the reason.",
              f'max by ({BY}, type, status, reason) (ashlar_service_condition{{{S},status!="True"}})', ["namespace", "name", "type", "status", "reason"]),
        table("Alerts that fire", "Alerts of the chart's rules.", 'max by (alertname, severity, namespace, name) (ALERTS{alertname=~"Ashlar.+",alertstate="firing"})',
              ["alertname", "severity", "namespace", "name"]),
    ]
    return dashboard("ashlar-fleet", "Ashlar / Fleet", "All InferenceServices at a glance.", panels, ALL)


def service():
    panels = [
        number("Replicas ready", "Pods that answer.", f"max(ashlar_service_replicas_ready{{{S}}})", "none", [1], low_is_bad=True),
        number("Requests", "Answered a second.", rate("ashlar_gateway_requests_total"), "reqps"),
        number("Failed", "Share of requests answered with a 5xx.", failed(), "percentunit", [0.001, 0.01], maximum=1),
        number("Time to first token, p95", "From arrival at the model pod to the first token.", quantile(0.95, "vllm:time_to_first_token_seconds"), "s", [1, 2.5]),
        number("Between tokens, p95", "From one token of a request to the next.", quantile(0.95, "vllm:inter_token_latency_seconds"), "s", [0.1, 0.25]),
        number("Generated tokens", "A second, over all replicas.", rate("vllm:generation_tokens_total"), "short"),
        row("Users' view"),
        lines("Time to first token", "From arrival at the model pod to the first token: queue and prompt.", quantiles("vllm:time_to_first_token_seconds"), "s", [1, 2.5]),
        lines("Between tokens", "From one token of a request to the next: how fast a stream flows.", quantiles("vllm:inter_token_latency_seconds"), "s", [0.1, 0.25]),
        lines("Whole request", "From arrival at the model pod to the last token.", quantiles("vllm:e2e_request_latency_seconds"), "s", [30, 60]),
        lines("First byte at the gateway", "From the request's head to the first byte of the answer: for streams the first token and all that comes before it, waking up included; for others the whole answer.",
              quantiles("ashlar_gateway_time_to_first_byte_seconds"), "s", [2.5, 10]),
        lines("Requests by status", "Answered a second, by HTTP status; 499 when the client left first.",
              [query(rate("ashlar_gateway_requests_total", "code"), "{{code}}")], "reqps", stack=True),
        lines("Failed and cut", "Share of requests answered with a 5xx, and answers that a replica broke off, a second.",
              [query(failed(), "failed"), query(f'{rate("ashlar_gateway_cut_responses_total", "by")}', "cut by {{by}}")], "none", [0.001, 0.01]),
        lines("Tokens", "A second, over all replicas: prompts' and generated ones.",
              [query(rate("vllm:generation_tokens_total"), "generated"), query(rate("vllm:prompt_tokens_total"), "prompt")], "short"),
        lines("Lengths", "Tokens of a request, mean.",
              [query(mean("vllm:request_prompt_tokens"), "prompt"), query(mean("vllm:request_generation_tokens"), "generated")], "short"),
        lines("Ended by reason", "Requests a second: stop and length are answers; abort is a client that left.",
              [query(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")], "reqps", stack=True),
        row("Engine's view"),
        lines("Requests in the engine", "With a place (the batch), without one, and held at the gateway.",
              [query(f"sum(vllm:num_requests_running{{{S}}})", "running"), query(f"sum(vllm:num_requests_waiting{{{S}}})", "waiting"),
               query(f"sum(ashlar_gateway_held_requests{{{S}}})", "held at the gateway")], "none"),
        lines("Batch", "Requests that run, by pod.", [query(of("vllm:num_requests_running", by="pod"), "{{pod}}")], "none"),
        lines("Tokens of a step", "Mean tokens computed in one step: prompts make it large.", [query(mean("vllm:iteration_tokens_total", "pod"), "{{pod}}")], "short"),
        lines("Steps", "Steps a second, by pod. None while requests run is a stalled engine.",
              [query(rate("vllm:iteration_tokens_total_count", "pod"), "{{pod}}")], "ops"),
        lines("KV cache", "Share of blocks in use, by pod. Near 1 requests wait or are preempted.",
              [query(of("vllm:kv_cache_usage_perc", "max", "pod"), "{{pod}}")], "percentunit", [0.8, 0.95], maximum=1),
        lines("Prefix cache hits", "Share of prompt tokens that were in the cache.",
              [query(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "hits")], "percentunit", maximum=1),
        lines("Preemptions", "Running requests that lost their blocks, a second; their work is done again.",
              [query(rate("vllm:num_preemptions_total", "pod"), "{{pod}}")], "ops", [0.1, 1]),
        lines("Where time goes", "Mean seconds of a request: without a place, on its prompt, on its tokens.",
              [query(mean("vllm:request_queue_time_seconds"), "queue"), query(mean("vllm:request_prefill_time_seconds"), "prompt"),
               query(mean("vllm:request_decode_time_seconds"), "decode")], "s", stack=True),
        lines("Prompt tokens by source", "A second: computed, or found in a cache.",
              [query(rate("vllm:prompt_tokens_by_source_total", "source"), "{{source}}")], "short", stack=True),
        row("Pods"),
        lines("Replicas", "Wanted, existing, answering, and of the newest revision.",
              [query(f"max(ashlar_service_replicas_{kind}{{{S}}})", kind) for kind in ("wanted", "ready", "updated")]
              + [query(f"max(ashlar_service_replicas{{{S}}})", "existing")], "none"),
        lines("Processor", "Cores in use, by pod.", [query(rate("process_cpu_seconds_total", "pod"), "{{pod}}")], "short"),
        lines("Memory", "Resident, by pod.", [query(of("process_resident_memory_bytes", "max", "pod"), "{{pod}}")], "bytes"),
        table("Conditions", "What the service says of itself.", f"max by (type, status, reason) (ashlar_service_condition{{{S}}})", ["type", "status", "reason"]),
        lines("Model on disk", "Bytes of the model: there, and in all. Only models that are downloaded have figures.",
              [query(f"max(ashlar_service_model_downloaded_bytes{{{S}}})", "there"), query(f"max(ashlar_service_model_bytes{{{S}}})", "in all")], "bytes", width=12),
    ]
    return dashboard("ashlar-service", "Ashlar / Service", "One InferenceService: what its users see, and what its engines do.", panels, ONE)


def autoscaler():
    def signal(which):
        return query(f'max by ({BY}) (ashlar_autoscaler_signal{{{S},signal="{which}"}})', NAMED)

    panels = [
        lines("Replicas wanted and had", "Wanted by the autoscaler, existing, answering, and the bounds.",
              [query(of("ashlar_autoscaler_desired_replicas", "max"), NAMED + " wanted"), query(of("ashlar_service_replicas", "max"), NAMED + " existing"),
               query(of("ashlar_service_replicas_ready", "max"), NAMED + " ready"), query(of("ashlar_service_replicas_min", "max"), NAMED + " min"),
               query(of("ashlar_service_replicas_max", "max"), NAMED + " max")], "none", width=12),
        lines("Demand", "Replicas that would carry the load at target, before windows, behavior and bounds.",
              [query(of("ashlar_autoscaler_demand_replicas", "max"), NAMED)], "short", width=12),
        row("Signals"),
        lines("KV cache", "Mean share of blocks in use over replicas; the target's default is 0.8.", [signal("kv_cache")], "percentunit", [0.8, 0.95], width=6, maximum=1),
        lines("Waiting at replicas", "Requests without a place; the target's default is 5 a replica.", [signal("waiting")], "none", width=6),
        lines("Held at gateways", "Requests that wait for a ready replica.", [signal("held")], "none", [1], width=6),
        lines("Running", "Requests that generate.", [signal("running")], "none", width=6),
        row("Decisions"),
        lines("Decisions by reason", "Decisions that changed the number of replicas, in five minutes.",
              [query(f"sum by ({BY}, reason) (increase(ashlar_autoscaler_decisions_total{{{S}}}[5m]))", NAMED + " {{reason}}")], "none", stack=True),
        table("Why nothing can be decided", "The condition ScalingReady: FixedReplicas means that something else scales.",
              f'max by ({BY}, status, reason) (ashlar_service_condition{{{S},type="ScalingReady"}})', ["namespace", "name", "status", "reason"], width=8),
        lines("Replicas unseen", "Ready replicas whose metrics are older than 3 s. They are never taken for idle.",
              [query(f"{of('ashlar_service_replicas_ready', 'max')} - {of('ashlar_autoscaler_fresh_replicas', 'max')}", NAMED)], "none", [1, 3], minimum=None),
        row("The autoscaler itself"),
        lines("Scrapes", "Of pods and gateways, a second, by result.",
              [query(rate("ashlar_autoscaler_scrapes_total", "kind, result", ""), "{{kind}} {{result}}")], "ops", stack=True),
        lines("Time of a scrape", "Scrapes end after 0.8 s.", quantiles("ashlar_autoscaler_scrape_seconds", ""), "s", [0.4, 0.8]),
        lines("Time to decide", "One round over all services; a round starts each 0.5 s.", quantiles("ashlar_autoscaler_round_seconds", ""), "s", [0.1, 0.5]),
    ]
    return dashboard("ashlar-autoscaler", "Ashlar / Autoscaler", "Signals, decisions with their reasons, replicas wanted and had.", panels, ALL)


def gateway():
    panels = [
        number("Gateways", "Gateway pods that were scraped.", "count(ashlar_gateway_connections)", "none", [1, 2], low_is_bad=True),
        number("Requests", "Answered a second.", rate("ashlar_gateway_requests_total"), "reqps"),
        number("Failed", "Share of requests answered with a 5xx.", failed(), "percentunit", [0.001, 0.01], maximum=1),
        number("In flight now", "Accepted and not ended.", f"sum(ashlar_gateway_in_flight_requests{{{S}}})", "none"),
        number("Held now", "Waiting for a ready replica.", f"sum(ashlar_gateway_held_requests{{{S}}})", "none", [1, 100]),
        number("Connections now", "Open connections of clients.", "sum(ashlar_gateway_connections)", "none", [8192, 16384]),
        row("Requests"),
        lines("By status", "Answered a second, by HTTP status; 499 when the client left first.", [query(rate("ashlar_gateway_requests_total", "code"), "{{code}}")], "reqps", stack=True),
        lines("By service", "Answered a second.", [query(rate("ashlar_gateway_requests_total", BY), NAMED)], "reqps"),
        lines("Found no service", "A second, by status: a wrong path, host or model, or no key.",
              [query(rate("ashlar_gateway_requests_total", "code", 'namespace="",name=""'), "{{code}}")], "reqps"),
        lines("First byte", "From the request's head to the first byte of the answer.", quantiles("ashlar_gateway_time_to_first_byte_seconds"), "s", [2.5, 10]),
        lines("Whole answer", "From the request's head to the last byte.", quantiles("ashlar_gateway_request_duration_seconds"), "s", [30, 120]),
        lines("In flight", "Accepted and not ended, by service.", [query(of("ashlar_gateway_in_flight_requests"), NAMED)], "none"),
        row("What was saved, and what was not"),
        lines("Held", "Waiting for a ready replica, by service.", [query(of("ashlar_gateway_held_requests"), NAMED)], "none", [1, 100]),
        lines("Tried again", "Attempts repeated on another replica before the first byte, a second, by cause.",
              [query(rate("ashlar_gateway_retries_total", "cause"), "{{cause}}")], "ops"),
        lines("Cut short", "Answers that ended before their last byte, a second, by who ended them.",
              [query(rate("ashlar_gateway_cut_responses_total", "by"), "{{by}}")], "ops"),
        lines("Replicas left out", "Times in five minutes that a replica got no requests for a while because its answers failed.",
              [query(f"sum by ({BY}) (increase(ashlar_gateway_ejections_total{{{S}}}[5m]))", NAMED)], "none", [1, 5]),
        lines("Replicas ready", "As each gateway sees them; gateways that disagree for long have stale watches.",
              [query(of("ashlar_gateway_ready_replicas", "max", f"{BY}, pod"), NAMED + " {{pod}}")], "none"),
        lines("Connections", "Open connections of clients, by gateway.", [query("sum by (pod) (ashlar_gateway_connections)", "{{pod}}")], "none", [8192, 16384]),
    ]
    return dashboard("ashlar-gateway", "Ashlar / Gateway", "The door that requests come through.", panels, ALL)


def operator():
    panels = [
        number("Operators", "Operator pods that were scraped.", "count(ashlar_operator_leader)", "none", [1, 2], low_is_bad=True),
        number("Leaders", "Exactly one leads; none means that nothing is reconciled.", "sum(ashlar_operator_leader)", "none", [1], low_is_bad=True),
        number("Reconciles", "A second.", rate("controller_runtime_reconcile_total", select='controller="inferenceservice"'), "ops"),
        number("Reconcile errors", "A second; each is tried again.",
               rate("controller_runtime_reconcile_total", select='controller="inferenceservice",result="error"') + " or vector(0)", "ops", [0.01, 0.1]),
        number("Reconcile, p99", "Seconds of one look at one service.", quantile(0.99, "controller_runtime_reconcile_time_seconds", select=""), "s", [0.5, 2.5]),
        number("Writes", "To the API server, a second. At rest there are none.", rate("ashlar_operator_writes_total", select=""), "ops"),
        row("Work"),
        lines("Reconciles by result", "A second.", [query(rate("controller_runtime_reconcile_total", "result", 'controller="inferenceservice"'), "{{result}}")], "ops", stack=True),
        lines("Time of a reconcile", "Seconds of one look at one service.", quantiles("controller_runtime_reconcile_time_seconds", ""), "s", [0.5, 2.5]),
        lines("Writes by kind", "To the API server, a second.", [query(rate("ashlar_operator_writes_total", "kind", ""), "{{kind}}")], "ops", stack=True),
        lines("Who leads", "1 while a pod leads.", [query("max by (pod) (ashlar_operator_leader)", "{{pod}}")], "none", stack=True, maximum=1),
        lines("Services by what Ready says", "By the reason of the condition Ready.",
              [query('count by (reason) (max by (namespace, name, reason) (ashlar_service_condition{type="Ready"}))', "{{reason}}")], "none", stack=True),
        lines("Rollouts", "Services whose newest revision is not where it should be, by reason.",
              [query('count by (reason) (max by (namespace, name, reason) (ashlar_service_condition{type="WorkloadsReady",status!="True"}))', "{{reason}}")], "none", stack=True),
    ]
    return dashboard("ashlar-operator", "Ashlar / Operator", "The controller: leadership, reconciles, writes.", panels, [])


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for build in (fleet, service, autoscaler, gateway, operator):
        made = build()
        (folder / f"{build.__name__}.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
