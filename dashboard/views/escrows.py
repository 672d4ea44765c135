"""A variant's full precision as escrow: asking for one, giving the variant's own weights up, getting them back."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import messages
from django.http import Http404, HttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_http_methods, require_POST

from dashboard.forms.releases import ReasonForm
from dashboard.lifecycle import Refused
from dashboard.models import Job
from dashboard.permissions import rule
from dashboard.selectors import escrows, registry
from dashboard.services.escrows import escrow_create, escrow_release, escrow_restore
from dashboard.views.answers import SignedInRequest, attempt, found


@rule("escrow.create")
@require_POST
def escrow_create_page(request: SignedInRequest, name: str) -> HttpResponse:
    checkpoint = found(lambda: registry.checkpoint_get(name))
    return _queued(request, name, lambda: escrow_create(actor=request.user, variant=checkpoint))


@rule("escrow.restore")
@require_POST
def escrow_restore_page(request: SignedInRequest, name: str) -> HttpResponse:
    checkpoint = found(lambda: registry.checkpoint_get(name))
    return _queued(request, name, lambda: escrow_restore(actor=request.user, variant=checkpoint))


def _queued(request: SignedInRequest, name: str, ask: Callable[[], Job]) -> HttpResponse:
    try:
        job = ask()
    except Refused as error:
        messages.error(request, str(error))
        return redirect("checkpoint-detail", name)
    return redirect("job-detail", job.pk)


@rule("escrow.release")
@require_http_methods(["GET", "POST"])
def escrow_release_page(request: SignedInRequest, name: str) -> HttpResponse:
    """What would be given up, file by file, and the form that does it."""
    checkpoint = found(lambda: registry.checkpoint_get(name))
    escrow = escrows.escrow_of(checkpoint)
    if escrow is None:
        raise Http404
    form, status = ReasonForm(request.POST or None), 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            reason = form.cleaned_data["reason"]
            done, status = attempt(form, lambda: escrow_release(actor=request.user, variant=checkpoint, reason=reason))
            if done is not None:
                messages.success(
                    request, _("%(name)s is kept as escrow alone; a clean-up frees its weights.") % {"name": name}
                )
                return redirect("checkpoint-detail", name)
    files = escrows.released_files(checkpoint)
    context = {
        "checkpoint": checkpoint,
        "escrow": escrow,
        "files": files,
        "freed": sum(size for _name, size, _digest in files),
        "form": form,
    }
    return render(request, "registry/release.html", context, status=status)
