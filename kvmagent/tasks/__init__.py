"""A task from accepted to delivered.

journal           every task, durable; journalfile is the only SQL
lanes             one change per VM at a time, in order of arrival; VMs side by side
executor          observe, decide, record, perform, observe, judge; run is a task's state,
                  vmturns says which task has a VM
pendingremovals   checks removals again that the guest had not finished when the task was answered
ondefine          prepares VMs automatically, by tasks like any other
hostqueries       answers host queries; managementserver remembers who the management server is
delivery          the outcome to the callback URL, until it is accepted or given up
callbackclient    where callbacks may go, and the connections that go there
notifications     reports about VMs that the management server gets without a request
faults            the points of a task at which tests kill the agent
"""
