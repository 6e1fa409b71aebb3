"""A task from accepted to delivered.

journal           every task, durable; journalfile is the only SQL
lanes             one change per VM at a time, in order of arrival; VMs side by side
executor          observe, decide, record, perform, observe, judge; run is a task under way, vmturns whose turn a VM is
pendingremovals   looks again after removals that the guest had not done when the task was answered
ondefine          prepares VMs without being asked, by tasks like any other
hostqueries       answers questions to the host; managementserver keeps who the management server is
delivery          the outcome to the callback URL, until it is taken or given up
callbackclient    where callbacks may go, and the connections that go there
notifications     what the management server is told of VMs without having asked
faults            the points of a task at which tests kill the agent
"""
