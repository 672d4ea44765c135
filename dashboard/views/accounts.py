"""People: signing in and out, language, preferences, and their roles."""

from __future__ import annotations

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.views import LoginView
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.utils.translation import override
from django.views.decorators.http import require_http_methods, require_POST

from dashboard.forms.accounts import PreferencesForm, RoleForm, UserForm
from dashboard.lifecycle import Refused
from dashboard.models import User
from dashboard.permissions import PUBLIC, rule
from dashboard.selectors import system
from dashboard.services.accounts import preferences_update, user_change_role, user_create
from dashboard.views.answers import SignedInRequest, attempt, found

sign_in = rule(PUBLIC)(
    require_http_methods(["GET", "POST"])(
        LoginView.as_view(template_name="accounts/sign_in.html", redirect_authenticated_user=True)
    )
)


@rule("account.preferences")
@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return redirect("sign-in")


@rule(PUBLIC)
@require_POST
def language(request: HttpRequest) -> HttpResponse:
    """Switch the language: kept with the person when signed in, in a cookie otherwise."""
    chosen = request.POST.get("language", "")
    target = request.POST.get("next", "")
    safe = url_has_allowed_host_and_scheme(target, {request.get_host()}, require_https=request.is_secure())
    response = HttpResponseRedirect(target if safe else "/")
    if chosen in dict(settings.LANGUAGES):
        if isinstance(request.user, User):
            preferences_update(actor=request.user, language=chosen, theme=request.user.theme)
        response.set_cookie(
            settings.LANGUAGE_COOKIE_NAME,
            chosen,
            max_age=31_536_000,
            samesite="Lax",
            secure=settings.HTTPS,
            httponly=True,
        )
    return response


@rule("account.preferences")
@require_http_methods(["GET", "POST"])
def preferences(request: SignedInRequest) -> HttpResponse:
    form = PreferencesForm(
        request.POST or None, initial={"language": request.user.language, "theme": request.user.theme}
    )
    status = 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            chosen, theme = form.cleaned_data["language"], form.cleaned_data["theme"]
            saved, status = attempt(form, lambda: preferences_update(actor=request.user, language=chosen, theme=theme))
            if saved is not None:
                with override(chosen or None):
                    messages.success(request, _("Saved."))
                return redirect("preferences")
    return render(request, "accounts/preferences.html", {"form": form}, status=status)


@rule("users.manage")
@require_http_methods(["GET", "POST"])
def user_list(request: SignedInRequest) -> HttpResponse:
    form = UserForm(request.POST or None)
    status = 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            values = form.cleaned_data
            made, status = attempt(
                form,
                lambda: user_create(
                    actor=request.user,
                    username=values["username"],
                    password=values["password"],
                    role=values["role"],
                ),
            )
            if made is not None:
                messages.success(request, _("%(name)s may sign in now.") % {"name": made})
                return redirect("user-list")
    rows = [(one, RoleForm(initial={"role": one.role}, auto_id=f"user{one.pk}_%s")) for one in system.user_list()]
    return render(request, "accounts/users.html", {"rows": rows, "form": form}, status=status)


@rule("users.manage")
@require_POST
def user_role(request: SignedInRequest, pk: int) -> HttpResponse:
    person = found(lambda: User.objects.get(pk=pk))
    form = RoleForm(request.POST)
    if not form.is_valid():
        messages.error(request, _("Choose a role and say why: the reason is kept in the history."))
        return redirect("user-list")
    role, reason = form.cleaned_data["role"], form.cleaned_data["reason"]
    try:
        changed = user_change_role(actor=request.user, user=person, role=role, reason=reason)
    except Refused as error:
        messages.error(request, str(error))
    else:
        words = _("%(name)s is %(role)s now.") % {"name": changed, "role": changed.get_role_display()}
        messages.success(request, words)
    return redirect("user-list")
