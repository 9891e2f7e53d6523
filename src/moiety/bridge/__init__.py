"""The text bridge: questions, answers, training stages, retrieval and controls; its Hub model files live in models/."""
