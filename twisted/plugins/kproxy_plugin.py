"""What this distribution offers to twistd, and by name to its own configuration."""

from twisted.application.service import ServiceMaker

from twisted_kproxy.plugin import PolicyMaker, SourceMaker, WriterMaker

kproxy = ServiceMaker("kproxy", "twisted_kproxy.tap", "The node service proxy of Kubernetes", "kproxy")  # type: ignore[no-untyped-call]

apiSource = SourceMaker("api", "twisted_kproxy.sources.api.ApiSource")
filesSource = SourceMaker("files", "twisted_kproxy.sources.files.FilesSource")

roundRobin = PolicyMaker("round-robin", "twisted_kproxy.balance.policies.RoundRobin")
randomly = PolicyMaker("random", "twisted_kproxy.balance.policies.Random")
leastConnections = PolicyMaker("least-connections", "twisted_kproxy.balance.policies.LeastConnections")

nftables = WriterMaker("nftables", "twisted_kproxy.netfilter.nft.writer.NftablesWriter")
pythonIptables = WriterMaker("python-iptables", "twisted_kproxy.netfilter.xt.writer.IptablesWriter")
iptables = WriterMaker("iptables", "twisted_kproxy.netfilter.xt.restore.RestoreWriter")
iptablesLegacy = WriterMaker("iptables-legacy", "twisted_kproxy.netfilter.xt.restore.legacyWriter")
iptablesNft = WriterMaker("iptables-nft", "twisted_kproxy.netfilter.xt.restore.nftWriter")
noRules = WriterMaker("none", "twisted_kproxy.netfilter.memory.NoWriter")
