"""A task from accepted to delivered.

journal    every task, durable; the only SQL
lanes      one change per VM at a time, in order of arrival; VMs side by side
executor   observe, decide, record, perform, observe, conclude
delivery   the outcome to the callback URL, until it is taken or given up
"""
