"""What Prometheus reads at /metrics. The only user of prometheus_client.

events    what happens, counted as it happens: a Recorder, handed to the lower floors, which know no library
state     what is so at the moment of a scrape: lanes, delivery, journal, libvirt
vms       what libvirt reports on all VMs, and what was last learnt of their guests
sampler   asks guests now and then
table     all of them by name, which docs/metrics.md is made from
"""
