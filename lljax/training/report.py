def write_report(workdir): pass
