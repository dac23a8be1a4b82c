"""Rows that are no packets: the engine, pages, configuration, events. Other tests prove them."""

from __future__ import annotations

from .site import Table

table = Table("UDP flows and the kernel")
table.shown(
    "stale-udp",
    "UDP flows to what no longer serves are forgotten; TCP is left alone",
    "kubernetes conntrack/cleanup.go",
    "integration.test_conntrack.test_moved",
    "unit.test_changes.test_staleFlows",
    "unit.test_ruleplane.test_flowsOfTcp",
)
table.shown(
    "stale-udp-none",
    "… also of Services without endpoints, and of those that are gone",
    "kubernetes#139629, #141371",
    "integration.test_endtoend.test_udpFollowsEndpoints",
    "integration.test_udp.test_endpointLeaves",
    "integration.test_staleflows.test_beforeEndpoints",
    "integration.test_staleflows.test_deleted",
)
table.shown(
    "udp-idle",
    "A UDP flow without datagrams ends after udp-idle-timeout",
    "kubernetes pkg/proxy/userspace",
    "unit.test_udp.test_expires",
    "unit.test_udp.test_slidesBothWays",
)
table.shown(
    "udp-datagrams", "Datagrams of any size pass whole", "RFC 768", "integration.test_endtoend.test_bigDatagrams"
)
table.shown(
    "conntrack-settings",
    "nf_conntrack_max, its hash table and its timeouts",
    "kubernetes conntrack/sysctls.go",
    "unit.test_sysctls.test_host",
    "unit.test_sysctls.test_neverLowered",
    "integration.test_sysctls.test_on",
    "integration.test_sysctls.test_auto",
)
table.leftOut(
    "route-localnet",
    "net.ipv4.conf.all.route_localnet",
    "KEP-3866",
    "not needed: node ports on loopback addresses lead to a socket of the node",
)
table.leftOut(
    "oom-score", "oom_score_adj of the proxy", "kubernetes options.go", "a matter of the unit: OOMScoreAdjust"
)

table.topic = "Engine and API"
table.shown(
    "startup-gate",
    "Nothing is written before every source has listed everything",
    "kubernetes proxiers",
    "unit.test_syncer.test_waitsForSources",
    "unit.test_ruleplane.test_startChangesNothing",
)
table.shown(
    "changes",
    "Only what differs is written; from A to B and back to A is nothing",
    "kubernetes endpointschangetracker.go",
    "unit.test_ruleplane.test_onlyWhatHasChanged",
    "unit.test_ruleplane.test_nothingToDo",
    "unit.test_cluster.test_equalWordIsSilent",
)
table.shown(
    "rate-limit",
    "min-sync-period and a burst of two; a failed update is tried again in full",
    "kubernetes bounded_frequency_runner.go",
    "unit.test_syncer.test_firstAtOnceThenCoalesced",
    "unit.test_syncer.test_failureIsRetriedInFull",
)
table.shown(
    "comparison",
    "Everything is compared with the kernel every sync-period",
    "KEP-3453",
    "unit.test_syncer.test_periodicComparison",
    "unit.test_ruleplane.test_fullRepairs",
    why="kube-proxy does so every hour.",
)
table.shown(
    "foreign-changes",
    "Rules that somebody else has removed come back at once",
    "kubernetes#81517",
    "unit.test_ruleplane.test_changedOutside",
    "integration.test_nftables.test_foreignFlushIsRepaired",
    why="kube-proxy sees it within 30 seconds in iptables mode, and never in nftables mode.",
)
table.shown(
    "list-watch",
    "List and watch of Services, slices and the own Node",
    "kubernetes cmd/kube-proxy/app/server.go",
    "unit.test_reflector.test_words",
    "unit.test_watchlist.test_oneWordThenChanges",
    "integration.test_e2e_upheavals.test_apiRestarts",
    why="JSON rather than protobuf.",
)
table.shown(
    "node",
    "Name, zone and pod networks come from the own Node; a change is followed",
    "kubernetes node.go",
    "unit.test_cluster.test_zone",
    "unit.test_cluster.test_nodeCallbacks",
    why="kube-proxy ends when its Node is gone or another, and waits for it at the start for up to five minutes.",
)
table.shown(
    "service-cidrs",
    "ServiceCIDR objects are followed, where the API server has them",
    "KEP-1880",
    "integration.test_kubectl.test_serviceCidrs",
    "unit.test_cluster.test_everyKindOfEverySource",
)
table.shown(
    "node-address",
    "Another address of the node is followed at once",
    "kubernetes node.go",
    "integration.test_addresses.test_otherAddress",
    "integration.test_addresses.test_familyComesLater",
    why="kube-proxy ends, and is started again.",
)
table.shown(
    "bad-object",
    "An object that cannot be read costs only itself; its last good version stays",
    "API validation",
    "unit.test_cluster.test_lastGoodStays",
    "unit.test_cluster.test_inAList",
)
table.shown(
    "cleanup",
    "--cleanup removes all rules, and nothing else",
    "kubernetes options.go",
    "unit.test_tap.test_removed",
    "unit.test_tap.test_nothing",
)
table.shown(
    "switch",
    "After a change of the writer, the rules of the other one go",
    "KEP-2448",
    "integration.test_switch.test_switch",
)
table.shown(
    "shutdown",
    "At the end new clients are refused, open connections may go on, then the rules go",
    "kubernetes#119265",
    "integration.test_endtoend.test_yDrains",
    why="kube-proxy leaves its rules in place: the kernel serves by itself, which a proxy in userspace cannot.",
)
table.shown(
    "crash",
    "Rules that a crash has left are taken over by the next start",
    "kubernetes#75360",
    "integration.test_endtoend.test_zLastKilledAndStartedAgain",
    "unit.test_userspace_dataplane.test_adoptsPort",
)
table.shown(
    "rights",
    "Rights at the API server: those of system:node-proxier",
    "kubernetes RBAC",
    "unit.test_tap.test_accessRights",
)
table.shown(
    "events",
    "Events about the Node and about Services, written to the API server",
    "kubernetes cmd/kube-proxy, healthcheck/service_health.go",
    "integration.test_kubectl.test_events",
    "unit.test_events.test_service",
    "unit.test_events.test_node",
)
table.shown(
    "explain",
    "Which endpoints a request may go to, and why not to the others: /explain",
    "kubernetes#74677",
    "integration.test_explain.test_explain",
    "unit.test_explainer.test_insideAndOutside",
    why="kube-proxy has nothing of the kind.",
)
table.leftOut(
    "primary-family",
    "A primary family",
    "kubernetes server.go",
    "both are served alike; a family that the node has no address of waits for one",
)
table.leftOut(
    "config-watch",
    "Ending when the configuration file changes",
    "kubernetes options.go",
    "the file is read at the start; restart the unit",
)
table.leftOut(
    "init-only",
    "--init-only",
    "kubernetes options.go",
    "the unit gives the few capabilities that are needed; nothing else needs root",
)

table.topic = "Health, metrics and pages"
table.shown(
    "health-check-node-port",
    "healthCheckNodePort: 200 while ready endpoints are on this node, with their number",
    "kubernetes healthcheck/service_health.go",
    "unit.test_healthcheck.test_answer",
    "integration.test_healthchecks.test_follows",
    "integration.test_healthchecks.test_onlyTerminating",
    "integration.test_healthchecks.test_inUse",
)
table.shown(
    "healthz",
    "/healthz: 200 or 503 with lastUpdated, currentTime, nodeEligible, healthy and status by family",
    "KEP-3836, kubernetes healthcheck/proxy_health.go",
    "unit.test_status.test_healthz",
    "unit.test_status.test_healthzUnhealthy",
    "unit.test_status.test_oldChangeIsUnhealthy",
)
table.shown(
    "healthz-node",
    "503 when the Node is going, or tainted ToBeDeletedByClusterAutoscaler",
    "KEP-3836",
    "unit.test_status.test_eligibleNode",
    "unit.test_status.test_ineligibleNode",
    why="A Node that no source has is eligible: sources may be files.",
)
table.shown("livez", "/livez: the same without the node", "KEP-3836", "unit.test_status.test_ineligibleNode")
table.shown(
    "metrics",
    "/metrics with kubeproxy_… names and labels, and what kube-proxy has none of: per Service",
    "kubernetes pkg/proxy/metrics",
    "unit.test_metrics.test_buckets",
    "unit.test_metrics.test_noLocalEndpoints",
    "unit.test_metrics.test_connection",
)
table.shown(
    "pages",
    "/proxyMode, /configz, /status",
    "kubernetes server.go",
    "unit.test_status.test_proxyMode",
    "unit.test_status.test_configz",
    "unit.test_status.test_status",
)
table.shown(
    "bind-failure",
    "A port that is taken is tried again every 5 seconds",
    "kubernetes server.go",
    "unit.test_status.test_retries",
)
table.leftOut(
    "debug-pages",
    "/debug/pprof, /debug/flags, /flagz, /statusz",
    "kubernetes server.go",
    "profiles of a Go program; /status and /configz tell the same of this one",
)
table.leftOut(
    "nfacct",
    "Counters of dropped INVALID packets and of loopback node ports",
    "kubernetes pkg/proxy/metrics",
    "there are no such rules",
)

table.topic = "Flags of kube-proxy, and what says the same"
table.flag("config", why="``twistd kproxy --config FILE``: an ini file")
table.flag("kubeconfig", "[source:NAME] kubeconfig")
table.flag("master", "[source:NAME] server")
table.flag("hostname-override", "[kproxy] node-name")
table.flag("proxy-mode", "[kproxy] mode", "[rules] writer", why="userspace, with rules by any of the writers")
table.flag("cluster-cidr", "[kproxy] cluster-cidr")
table.flag(
    "detect-local-mode pod-bridge-interface pod-interface-name-prefix",
    "[kproxy] detect-local",
    "[kproxy] pod-bridge",
    "[kproxy] pod-interface-prefix",
)
table.flag(
    "masquerade-all", "[kproxy] masquerade-all", why="accepted; there is nothing to masquerade in userspace mode"
)
table.flag("nodeport-addresses", "[kproxy] node-port-addresses")
table.flag("iptables-sync-period ipvs-sync-period", "[kproxy] sync-period")
table.flag("iptables-min-sync-period ipvs-min-sync-period", "[kproxy] min-sync-period")
table.flag("healthz-bind-address healthz-port", "[health] bind")
table.flag("metrics-bind-address metrics-port", "[metrics] bind")
table.flag("ipvs-scheduler", "[balance] policy", why="round-robin, random, least-connections, or a plug-in")
table.flag("udp-timeout", "[userspace] udp-idle-timeout", why="30 s by default; the first kube-proxy had 250 ms")
table.flag("proxy-port-range", "[userspace] port-range")
table.flag("cleanup", why="``twistd kproxy --cleanup``")
table.flag("version", why="``twistd kproxy --version``")
table.flag("v vmodule logging-format", "[kproxy] log-level", "[kproxy] log-format")
table.flag(
    "conntrack-max-per-core conntrack-min conntrack-tcp-timeout-established conntrack-tcp-timeout-close-wait",
    "[conntrack] max-per-core",
    "[conntrack] min",
    "[conntrack] tcp-established-timeout",
    "[conntrack] tcp-close-wait-timeout",
    why="in the host's network namespace, unless sysctls says otherwise",
)
table.flag(
    "conntrack-tcp-be-liberal conntrack-udp-timeout conntrack-udp-timeout-stream",
    "[conntrack] tcp-be-liberal",
    "[conntrack] udp-timeout",
    "[conntrack] udp-stream-timeout",
)
table.leftOut(
    "flags-bind",
    "``--bind-address``, ``--bind-address-hard-fail``",
    "",
    "the node's address comes from its routes; a port that is taken is always tried again",
)
table.leftOut(
    "flags-api",
    "``--kube-api-qps``, ``--kube-api-burst``, ``--kube-api-content-type``, ``--config-sync-period``",
    "",
    "a few watches need no limit; JSON; a list is compared, never replayed",
)
table.leftOut(
    "flags-ipvs", "``--ipvs-exclude-cidrs``, ``--ipvs-strict-arp``, ``--ipvs-tcp-timeout`` …", "", "there is no IPVS"
)
table.leftOut("flags-masquerade-bit", "``--iptables-masquerade-bit``", "", "nothing is masqueraded")
table.leftOut(
    "flags-localhost",
    "``--iptables-localhost-nodeports``",
    "",
    "node-port-addresses says it: without 127.0.0.0/8 in it there are none",
)
table.leftOut(
    "flags-others",
    "``--write-config-to``, ``--profiling``, ``--feature-gates``, ``--show-hidden-metrics-for-version``",
    "",
    "``--check`` prints what is in force; there are no gates",
)
