"""A task from accepted to delivered.

journal      every task, durable; journalfile is the only SQL
lanes        one change per VM at a time, in order of arrival; VMs side by side
executor     observe, decide, record, perform, observe, conclude; run is a task under way, vmturns whose turn a VM is
late         looks again after removals that the guest had not done when the task was answered
questions    answers questions to the host; servermemory keeps who the management server is
delivery     the outcome to the callback URL, until it is taken or given up
callbacks    where callbacks may go, and the connections that go there
reports      what the management server is told of VMs without having asked
faults       the points of a task at which tests kill the agent
"""
