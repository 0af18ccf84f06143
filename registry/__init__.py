"""What everything else refers to: versions, data sets, studies, deployments, evidence."""
