"""Many agents in one box: what a fleet of them does to its management server, to Prometheus and to itself.

make fleet N=100 SECONDS=120

limits     how many agents this machine can have
server     the management server of docs/management-server, which counts its connections, callbacks and copies
hosts      the agents, each with a node of libvirt's test driver; the server and Prometheus as processes
scenes     what is done to them, and the figures of it
invariant  every accepted task is told, none is done twice
waves      an upgrade by the Ansible role, wave by wave
measure    what one agent costs, by the number of its VMs
"""
