"""Top floor: command line, launchers, and (with Ray) jobs and worker groups. Imports both floors below."""
